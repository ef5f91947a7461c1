"""The recipes that come along: in a checkout `recipes/`, in a wheel `refalign_adapter/_recipes/`."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ..atomic import atomic_file
from ..errors import UserError
from ..files import require_writable_folder

CHECKOUT = "recipes"
_ACCELERATE_FILE = re.compile(r"recipes/accelerate/([\w.-]+\.yaml)")


def recipes_folder() -> Path:
    """The folder that holds `configs/` and `accelerate/`.

    Raises:
        UserError: neither a wheel's nor a checkout's is there.
    """
    package = Path(__file__).parent.parent
    for folder in (package / "_recipes", package.parent / CHECKOUT):
        if (folder / "configs").is_dir():
            return folder
    raise UserError("recipes: none came with this installation; reinstall refalign-adapter")


def list_recipes() -> list[str]:
    """Names of the recipes, `<base>/<variant>`."""
    configs = recipes_folder() / "configs"
    return sorted(path.relative_to(configs).with_suffix("").as_posix() for path in configs.glob("*/*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe that comes along.

    Raises:
        UserError: no such recipe.
    """
    known = list_recipes()
    if name not in known:
        raise UserError(f"recipe: there is no {name!r}; choose one of {', '.join(known)}")
    return recipes_folder() / "configs" / f"{name}.yaml"


def copy_recipe(name: str, output: str | Path = ".") -> Path:
    """Copy a recipe, and beside it the accelerate configuration that its first line launches it with.

    The first line then names the copies.

    Args:
        name: as `list_recipes` gives it.
        output: a `.yaml` file, or a folder for `<base>-<variant>.yaml`.

    Returns:
        The copy.

    Raises:
        UserError: no such recipe, a copy that is there already, or a folder that cannot be written.
    """
    source, target = recipe_path(name), Path(output)
    if target.suffix not in (".yaml", ".yml"):
        target = target / f"{name.replace('/', '-')}.yaml"
    if target.exists():
        raise UserError(f"output: {str(target)!r} exists already; choose another name or delete it")
    require_writable_folder(target.parent, "output")
    text = source.read_text(encoding="utf-8")
    text = text.replace(f"{CHECKOUT}/configs/{name}.yaml", target.as_posix())
    for file in sorted(set(_ACCELERATE_FILE.findall(text))):
        beside = target.parent / file
        if not beside.exists():
            with atomic_file(beside) as temporary:
                shutil.copyfile(recipes_folder() / "accelerate" / file, temporary)
        text = text.replace(f"{CHECKOUT}/accelerate/{file}", beside.as_posix())
    with atomic_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target
