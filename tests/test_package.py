"""The package as a whole: imports go down only and form no ring, importing it is light, the public names resolve."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from importlib.metadata import version
from importlib.util import resolve_name
from pathlib import Path

import pytest

import refalign_adapter

PACKAGE = "refalign_adapter"
ROOT = Path(refalign_adapter.__file__).parent

LAYERS = [
    {
        "errors",
        "exchange",
        "files",
        "leftovers",
        "atomic",
        "json_files",
        "tensor_files",
        "hashes",
        "library_output",
        "signals",
        "progress",
        "plugins",
    },
    {"hub", "model_configs", "config_checks", "config", "batch", "grids", "media"},
    {"flow", "alignment"},
    {"teachers", "families"},
    {"export"},
    {"branch", "data.sources"},
    {"data.cache"},
    {"data.check"},
    {"pipelines"},
    {"recipes"},
    {"training", "generation"},
    {"estimate"},
    {"analysis", "world"},
    {"commands"},
]
"""Lowest first; a module imports from its own layer and those below. What is not named is an entry: on top of all."""

HEAVY = {
    "accelerate",
    "av",
    "datasets",
    "diffusers",
    "matplotlib",
    "peft",
    "scipy",
    "sklearn",
    "torch",
    "transformers",
}


def module_name(path: Path) -> str:
    """`refalign_adapter/branch/attach.py` -> `branch.attach`; `__init__.py` is its package, the root is ``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8"), str(path))
    for path in sorted(ROOT.rglob("*.py"))
    if "_recipes" not in path.parts
}
PACKAGES = {module_name(path) for path in ROOT.rglob("__init__.py")}


def imported(module: str, node: ast.AST) -> list[str]:
    """Modules of this package that an import statement of `module` names; `` is the package's root."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE]
        return [name.removeprefix(PACKAGE).lstrip(".") for name in names]
    if not isinstance(node, ast.ImportFrom):
        return []
    here = f"{PACKAGE}.{module}".rstrip(".")
    parent = here if module in PACKAGES else here.rpartition(".")[0]
    source = resolve_name("." * node.level + (node.module or ""), parent)
    if source.split(".")[0] != PACKAGE:
        return []
    source = source.removeprefix(PACKAGE).lstrip(".")
    candidates = [f"{source}.{alias.name}".lstrip(".") for alias in node.names]
    return [name if name in SOURCES else source for name in candidates]


def layer(module: str) -> int:
    first, *more = module.split(".")
    names = {first, ".".join([first, *more[:1]])}
    return next((index for index, parts in enumerate(LAYERS) if names & parts), len(LAYERS))


MODULES = [name for name in SOURCES if name]


def statements(module: str) -> list[tuple[str, ast.Import | ast.ImportFrom, str]]:
    """(place, statement, name of the module of this package it imports), for every import wherever it stands."""
    return [
        (f"{module}, line {node.lineno}: {ast.unparse(node)}", node, name)
        for node in ast.walk(SOURCES[module])
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported(module, node)
    ]


def test_imports_go_down_only():
    upward = []
    for module in MODULES:
        for place, _, name in statements(module):
            if name and layer(name) > layer(module):
                upward.append(place)
    assert not upward, "\n".join(["these imports go up:", *dict.fromkeys(upward)])


def test_package_imports_itself_relatively_and_never_its_root():
    wrong = [
        place
        for module in MODULES
        for place, node, name in statements(module)
        if not name or not getattr(node, "level", 0)
    ]
    assert not wrong, "\n".join(["import the defining module, relatively:", *dict.fromkeys(wrong)])


def test_modules_form_no_ring():
    graph = {module: {name for _, _, name in statements(module)} - {module, ""} for module in MODULES}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) >= set(graph)


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.errors", f"{PACKAGE}.config", f"{PACKAGE}.commands.app"])
def test_import_is_light(module):
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


@pytest.mark.parametrize("name", refalign_adapter.__all__)
def test_public_names_resolve(name):
    value = getattr(refalign_adapter, name)
    assert value.__name__ == name
    assert value.__doc__
    assert value.__module__.startswith(f"{PACKAGE}.")


def test_public_names_are_declared_once_and_alike():
    (declared,) = [
        statement.body
        for statement in SOURCES[""].body
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"
    ]
    for_tools = {
        alias.name: "." * node.level + (node.module or "")
        for node in declared
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert for_tools == refalign_adapter._SOURCES
    assert sorted(refalign_adapter.__all__) == sorted(for_tools)
    assert set(refalign_adapter.__all__) <= set(dir(refalign_adapter))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        refalign_adapter.nonsense  # noqa: B018


def test_version_is_the_installed_one():
    assert refalign_adapter.__version__ == version("refalign-adapter")


def test_public_definitions_have_docstrings():
    lacking = [f"{module}: the module" for module in MODULES if module not in PACKAGES]
    lacking = [place for place in lacking if not ast.get_docstring(SOURCES[place.partition(":")[0]])]
    lacking += [
        f"{module}, line {node.lineno}: {node.name}"
        for module in MODULES
        for node in SOURCES[module].body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        if not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert not lacking, "\n".join(["these lack a docstring:", *lacking])


@pytest.mark.parametrize("module", MODULES)
def test_modules_can_be_imported(module):
    assert import_module(f"{PACKAGE}.{module}").__name__ == f"{PACKAGE}.{module}"
