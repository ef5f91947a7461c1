"""The `refalign` command. Thin: each command reads its options and calls one function of the package."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from ..errors import UserError
from ..signals import ended_by_signals, stopping_means, tell
from .arguments import Overrides
from .estimate import estimate
from .generate import generate

ORDER = ("doctor", "demo", "data", "cache", "estimate", "train", "generate", "recipes")
"""Commands as an adapter's life goes; `--help` tells them so."""


class _InOrder(TyperGroup):
    def list_commands(self, ctx: object) -> list[str]:
        """The commands' names as `ORDER` has them; typer alone would put groups last."""
        return sorted(self.commands, key=ORDER.index)


app = typer.Typer(
    name="refalign",
    cls=_InOrder,
    help="Reference images for frozen video diffusion transformers, by a small adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="Training recipes that come with the package: list and copy.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
data_app = typer.Typer(help="Look after training data: check.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake is printed as plain lines and exits with 2."""
    with ended_by_signals():
        _quiet_libraries()
        try:
            app(args=arguments)
        except UserError as error:
            for line in str(error).splitlines():
                tell(f"error: {line}")
            sys.exit(2)


def _quiet_libraries() -> None:
    """Leave out libraries' notes about optional parts that a user of this command can do nothing about."""
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _version(show: bool) -> None:
    if show:
        print(importlib.metadata.version("refalign-adapter"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Reference images for frozen video diffusion transformers, by a small adapter."""


@app.command()
def doctor() -> None:
    """Tell what this machine can run."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from .doctor import examine

    findings = examine()
    table = Table("", "topic", "found", "advice", box=None)
    marks = {True: "[green]ok[/]", False: "[red]missing[/]", None: "[yellow]note[/]"}
    for finding in findings:
        table.add_row(marks[finding.ok], *map(escape, (finding.topic, finding.value, finding.advice)))
    Console().print(table)
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(1)


@recipes_app.command("list")
def recipes_list() -> None:
    """Name the recipes."""
    from ..recipes.shipped import list_recipes

    for name in list_recipes():
        print(name)


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="A name that `refalign recipes list` prints.")],
    output: Annotated[Path, typer.Option(help="File or folder to copy to.")] = Path("."),
) -> None:
    """Copy a recipe, so that you can change it."""
    from ..recipes.shipped import copy_recipe

    print(copy_recipe(name, output))


@data_app.command("check")
def data_check(
    config: Annotated[Path, typer.Option(help="The recipe (YAML); of it, the data section counts.")],
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="Folder of the report; an older report is replaced.")] = Path(
        "data_check"
    ),
    sheets: Annotated[int, typer.Option(help="Rows on the contact sheets, those with problems first; 0: none.")] = 120,
    workers: Annotated[int | None, typer.Option(help="Processes that decode; data.num_workers if not given.")] = None,
) -> None:
    """Find every problem of a data set before it is encoded, and show its rows as training will see them.

    Exits with 2 when there are problems. Neither the base model nor a GPU is needed.
    """
    from .data_check import run

    with stopping_means("no report was written"):
        run(config, overrides or [], output=output, sheets=sheets, workers=workers)


@app.command()
def cache(
    config: Annotated[Path, typer.Option(help="The recipe (YAML).")],
    overrides: Overrides = None,
    rehash: Annotated[bool, typer.Option("--rehash", help="Hash every file anew, also those unchanged.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Make nothing: read and check every part.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Make nothing: delete parts that no row needs.")] = False,
) -> None:
    """Encode clips, references and captions once, so that training needs the transformer alone."""
    from .cache import look_after, run

    with stopping_means("run the same command again to go on"):
        if verify or prune:
            look_after(config, overrides or [], verify=verify, prune=prune)
        else:
            run(config, overrides or [], rehash=rehash)


def _show_fields(show: bool) -> None:
    if show:
        from ..recipes.help import describe_fields

        print("Fields of a recipe:\n" + "\n".join(describe_fields()))
        raise typer.Exit


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="The recipe (YAML).")],
    overrides: Overrides = None,
    fields: Annotated[
        bool,
        typer.Option("--help-fields", callback=_show_fields, is_eager=True, help="Explain every field of a recipe."),
    ] = False,
) -> None:
    """Train an adapter on this machine: on one GPU, in bf16 unless the recipe says otherwise, or else on the CPU.

    The cache comes first: `refalign cache` with the same recipe. On several GPUs:

    accelerate launch --multi_gpu --num_processes N --mixed_precision bf16 -m refalign_adapter.train --config FILE …
    """
    from .train import STOPPING, run

    with stopping_means(STOPPING):
        code = run(config, overrides or [], alone=True)
    raise typer.Exit(code)


app.command()(generate)
app.command()(estimate)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo_output"),
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    prompt: Annotated[
        str | None, typer.Option(help="Of the first video, with --reference: 'a cat bounces, in a meadow'.")
    ] = None,
    reference: Annotated[list[str] | None, typer.Option(help="Your own picture for it; repeat for more.")] = None,
) -> None:
    """Show a video with references in a minute; then train an adapter in a small drawn world, and write a report."""
    from ..world.demo import DemoOptions, run_demo

    with stopping_means("the same command goes on from here"):
        run_demo(DemoOptions(output=output, seed=seed, prompt=prompt, references=tuple(reference or ())))


if __name__ == "__main__":
    main()
