"""Encode clips, references and captions once: `python -m refalign_adapter.cache --config FILE [key=value …]`.

`accelerate launch -m refalign_adapter.cache …` shares the rows out among its processes. Running it again goes on where
an interrupted run stopped, and encodes anew only what has changed.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import ConfigError, UserError


def run(config: str | Path, overrides: Sequence[str] = (), *, rehash: bool = False) -> None:
    """Make the cache that a recipe needs and print what was done.

    Args:
        config: the recipe, a YAML file.
        overrides: `key=value` with dotted keys; they win over the file.
        rehash: hash every file of the data set anew.

    Raises:
        UserError: a mistake in the recipe, or rows that cannot be read; all of them at once.
    """
    from .training.recipe_file import load_recipe

    recipe = load_recipe(config, overrides)
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from .data.cache import cache_dataset, process_state
    from .data.options import options_of

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn("caching rows"), *columns, console=Console(stderr=True))
    task = bar.add_task("rows", total=None)

    def show(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    options = options_of(recipe)
    main_process = process_state().is_main_process
    try:
        report = cache_dataset(options, progress=show if main_process else None, rehash=rehash)
    finally:
        if bar.live.is_started:
            bar.stop()
    if main_process:
        print(report.summary())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m refalign_adapter.cache",
        description="Encode clips, references and captions once, so that training needs the transformer alone.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the recipe, a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="fields that win over the file, such as data.height=240"
    )
    parser.add_argument("--rehash", action="store_true", help="hash every file anew, also those that look unchanged")
    arguments = parser.parse_args(argv)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of CPU kernels that nothing here uses
    try:
        run(arguments.config, arguments.overrides, rehash=arguments.rehash)
    except UserError as error:
        # Lists of problems are the same on every process.
        if not isinstance(error, ConfigError) or int(os.environ.get("RANK", 0)) == 0:
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
