"""Train an adapter: `refalign train` on one device, `accelerate launch -m refalign_adapter.train` on any number."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..signals import ended_by_signals, stopping_means, tell

if TYPE_CHECKING:
    from ..recipes.schema import Recipe

LAUNCHED = "ACCELERATE_MIXED_PRECISION"
"""What accelerate's launcher always sets, and what the training takes its precision from when the recipe is silent."""

STOPPING = "the last checkpoint, if there is one, is whole"
"""What a signal means before training has begun, or after it."""


class _RecipeHelp(argparse.Action):
    """Print usage and every field of a recipe."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: object):
        super().__init__(option_strings, dest, nargs=0, help="show this and every field of a recipe")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from ..recipes.help import describe_fields

        print(parser.format_help())
        print("Fields of a recipe:\n" + "\n".join(describe_fields()))
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="accelerate launch -m refalign_adapter.train",
        description="Train an adapter as a recipe says. Recipes that come along: `refalign recipes list`.",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action=_RecipeHelp)
    parser.add_argument("--config", required=True, metavar="FILE", help="the recipe, a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="fields that win over the file, such as data.height=240"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 128 + n after signal n in training.

    Raises:
        SystemExit: 128 + n after signal n before training began or after it.
    """
    with ended_by_signals(), stopping_means(STOPPING):
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    arguments = build_parser().parse_args(argv)
    return run(arguments.config, arguments.overrides)


def run(config: str | Path, overrides: Sequence[str] = (), *, alone: bool = False) -> int:
    """Train as a recipe says; mistakes are told as lines.

    Args:
        config: the recipe, a YAML file.
        overrides: `key=value` with dotted keys; they win over the file.
        alone: no launcher has chosen device and precision: it is the first GPU in bf16 if there is one, else the CPU.

    Returns:
        The exit code: 0, 2 for a user's mistake, 128 + n after signal n.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of CPU kernels that training does not use
    process = int(os.environ.get("RANK", 0))
    try:
        from ..recipes.file import load_recipe

        recipe = load_recipe(config, overrides, check_machine=True)
    except UserError as error:
        return _tell(error) if process == 0 else 2  # the same on every process
    if alone and LAUNCHED not in os.environ:
        _choose_device(recipe, config, overrides)
    from ..training.interrupt import FailedElsewhere, Interrupted
    from ..training.loop import train

    try:
        train(recipe)
    except FailedElsewhere:
        return 2
    except UserError as error:
        return _tell(error, f"[process {process}] " if process else "")
    except Interrupted as stop:
        if process == 0:
            tell(str(stop))
        return stop.exit_code
    return 0


def _choose_device(recipe: Recipe, config: str | Path, overrides: Sequence[str]) -> None:
    """What a launcher would set, for one device; several GPUs are told how to be used."""
    import torch

    if not torch.cuda.is_available():
        return
    if recipe.mixed_precision is None and torch.cuda.is_bf16_supported():
        os.environ[LAUNCHED] = "bf16"
    if (count := torch.cuda.device_count()) > 1:
        tell(f"training on 1 of {count} GPUs; on all: {launch_line(recipe, config, overrides, count)}")


def launch_line(recipe: Recipe, config: str | Path, overrides: Sequence[str], processes: int) -> str:
    """The command that trains the same on several GPUs of this machine."""
    precision = recipe.mixed_precision or os.environ.get(LAUNCHED, "no")
    launcher = f"accelerate launch --multi_gpu --num_processes {processes} --mixed_precision {precision}"
    return f"{launcher} -m refalign_adapter.train {shlex.join(['--config', str(config), *overrides])}"


def _tell(error: UserError, prefix: str = "") -> int:
    for line in str(error).splitlines():
        tell(f"{prefix}error: {line}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
