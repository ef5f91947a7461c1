"""Train an adapter: `accelerate launch -m refalign_adapter.train --config FILE [key=value …]`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from ..errors import UserError
from ..signals import ended_by_signals, stopping_means, tell


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
    with ended_by_signals(), stopping_means("the last checkpoint, if there is one, is whole"):
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    arguments = build_parser().parse_args(argv)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of CPU kernels that training does not use
    process = int(os.environ.get("RANK", 0))
    try:
        from ..recipes.file import load_recipe

        recipe = load_recipe(arguments.config, arguments.overrides, check_machine=True)
    except UserError as error:
        return _tell(error) if process == 0 else 2  # the same on every process
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


def _tell(error: UserError, prefix: str = "") -> int:
    for line in str(error).splitlines():
        tell(f"{prefix}error: {line}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
