"""Encode clips, references and captions once: `python -m refalign_adapter.cache --config FILE [key=value …]`.

`accelerate launch -m refalign_adapter.cache …` shares the rows out among its processes. Running it again goes on where
an interrupted run stopped, and encodes anew only what has changed. `--verify` and `--prune` look after a finished one.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, UserError
from ..progress import progress_bar
from ..signals import ended_by_signals, stopping_means, tell

if TYPE_CHECKING:
    from ..data.cache.options import CacheOptions


def run(config: str | Path, overrides: Sequence[str] = (), *, rehash: bool = False) -> None:
    """Make the cache that a recipe needs and print what was done.

    Args:
        config: the recipe, a YAML file.
        overrides: `key=value` with dotted keys; they win over the file.
        rehash: hash every file of the data set anew.

    Raises:
        UserError: a mistake in the recipe, or rows that cannot be read; all of them at once.
    """
    options = _options(config, overrides)
    from ..data.cache.build import cache_dataset, process_state

    main_process = process_state().is_main_process
    with progress_bar("caching") as show:
        report = cache_dataset(options, progress=show if main_process else None, rehash=rehash)
    if main_process:
        print(report.summary())


def look_after(
    config: str | Path, overrides: Sequence[str] = (), *, verify: bool = False, prune: bool = False
) -> None:
    """Check a finished cache, delete what it does not need, and print what was found; one process is enough.

    Args:
        config, overrides: as in `run`.
        verify: read every part of every row.
        prune: delete the parts that no row needs any more; not done when the check fails.

    Raises:
        UserError: there is no finished cache of this recipe, or parts are missing or damaged.
    """
    options = _options(config, overrides)
    from ..data.cache.verify import prune_cache, verify_cache

    if verify:
        with progress_bar("checking parts") as show:
            files = verify_cache(options, show)
        print(f"checked {files.count} parts, {files.bytes / 1e6:.1f} MB: all whole")
    if prune:
        files = prune_cache(options.cache_dir)
        print(f"deleted {files.count} parts that no row needs, {files.bytes} bytes")


def _options(config: str | Path, overrides: Sequence[str]) -> CacheOptions:
    from ..recipes.cache_options import options_of
    from ..recipes.file import load_recipe

    return options_of(load_recipe(config, overrides))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for a user's mistake.

    Raises:
        SystemExit: 128 + n after signal n.
    """
    with ended_by_signals(), stopping_means("run the same command again to go on"):
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m refalign_adapter.cache",
        description="Encode clips, references and captions once, so that training needs the transformer alone.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the recipe, a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="fields that win over the file, such as data.height=240"
    )
    parser.add_argument("--rehash", action="store_true", help="hash every file anew, also those that look unchanged")
    parser.add_argument("--verify", action="store_true", help="make nothing: read and check every part of every row")
    parser.add_argument("--prune", action="store_true", help="make nothing: delete parts that no row needs any more")
    arguments = parser.parse_args(argv)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of CPU kernels that nothing here uses
    try:
        if arguments.verify or arguments.prune:
            look_after(arguments.config, arguments.overrides, verify=arguments.verify, prune=arguments.prune)
        else:
            run(arguments.config, arguments.overrides, rehash=arguments.rehash)
    except UserError as error:
        # Lists of problems are the same on every process.
        if not isinstance(error, ConfigError) or int(os.environ.get("RANK", 0)) == 0:
            for line in str(error).splitlines():
                tell(f"error: {line}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
