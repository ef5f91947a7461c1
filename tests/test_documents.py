"""README and docs: short enough, links that lead somewhere, commands, options and recipes that exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from refalign_adapter.commands.app import app
from refalign_adapter.recipes.shipped import list_recipes

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
by_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def anchors(path):
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", path.read_text())
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(path):
    """Words of every `refalign …` line in a document's blocks of shell."""
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("refalign "):
                yield shlex.split(line, comments=True)[1:]


def test_the_readme_is_short_and_names_the_two_commands_and_every_guide():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    assert "make demo" in text
    assert "make test" in text
    assert [path.name for path in DOCUMENTS[1:] if f"](docs/{path.name})" not in text] == []


@by_document
def test_links_lead_to_files_and_headings_that_are_there(path):
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", path.read_text()):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@by_document
def test_commands_are_as_the_command_line_takes_them(path):
    wrong = []
    for words in commands(path):
        command, names = typer.main.get_command(app), list(words)
        while hasattr(command, "commands"):
            command = command.commands[names.pop(0)]
        try:
            command.make_context("refalign", names)
        except Exception as error:  # an option or argument that is not there
            wrong.append(f"refalign {shlex.join(words)}: {error}")
    assert wrong == []


@by_document
def test_recipes_exist(path):
    named = re.findall(r"(?<![\w/])((?:wan|demo)[\w.-]*/[\w-]*stage[\w-]+)", path.read_text())
    assert sorted(set(named) - set(list_recipes())) == []
