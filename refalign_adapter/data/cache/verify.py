"""Looking after a finished cache: is every part of every row whole, and which files does no row need any more?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError, ReadError
from .contents import File, row_contents, text_contents
from .dataset import open_cache
from .entries import REMEDY
from .index import read_index, read_meta
from .lock import deleting
from .options import CacheOptions
from .parts import DAMAGED, KEY, CacheGoneError, Expected, PartStore

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Files:
    """How many files, and their bytes."""

    count: int
    bytes: int


def verify_cache(options: CacheOptions, progress: Progress | None = None) -> Files:
    """Read every part of every row: shape, type, finite numbers, and the checksum that was written with it.

    A damaged file is set aside under another ending, so that the next cache run makes it anew.

    Args:
        options: whose cache.
        progress: called with (files done, files in all).

    Returns:
        The files, all of them whole.

    Raises:
        UserError: there is no finished cache, it goes away meanwhile, or it was made with other options or from
            another manifest.
        ConfigError: lists every part that is missing, damaged or not given by the system, one line each, and what
            to do.
    """
    for split in options.manifests:
        open_cache(options, split=split)
    store = PartStore(options.cache_dir)
    expected: dict[File, Expected] = {}
    rows: dict[File, list[str]] = {}
    for row, file, content in _all_expected(options, store):
        expected.setdefault(file, content)
        rows.setdefault(file, []).append(row)
    problems, summary, size = [], [], 0
    damaged = withheld = 0
    for done, (file, content) in enumerate(expected.items(), 1):
        others = f" and {len(rows[file]) - 1} more" if len(rows[file]) > 1 else ""
        try:
            problem = store.problem(*file, content)
        except CacheGoneError:
            raise
        except ReadError as error:
            withheld += 1
            problems.append(f"{rows[file][0]}{others}: {error}")
        else:
            if problem is None:
                size += store.size(*file)
            else:
                damaged += 1
                problems.append(f"{rows[file][0]}{others}: {str(store.path(*file))!r} {problem}")
                store.set_aside(*file)
        if progress:
            progress(done, len(expected))
    if damaged:
        summary += [f"{damaged} of {len(expected)} parts are missing or damaged; {REMEDY}, which makes these anew"]
    if withheld:
        summary += [f"{withheld} of {len(expected)} parts are not given by the system and may be whole"]
    if problems:
        raise ConfigError([*problems, *summary])
    return Files(len(expected), size)


def _all_expected(options: CacheOptions, store: PartStore) -> Iterator[tuple[str, File, Expected]]:
    """(row, file, what it has to hold) for every part of every row."""
    meta = read_meta(options.cache_dir)
    text = text_contents(meta, store)
    for name, key in meta["empty_text"].items():
        yield "the empty text", ("text", key), text[name]
    for split in options.manifests:
        for entry in read_index(options.cache_dir, split, meta):
            for file, content in row_contents(entry, meta, text):
                yield entry.place(split), file, content


def prune_cache(cache_dir: str | Path) -> Files:
    """Delete the parts that no index names any more, and the damaged ones that `verify_cache` set aside.

    Args:
        cache_dir: folder of a finished cache.

    Returns:
        What was deleted.

    Raises:
        UserError: there is no finished cache, or a run is filling it.
    """
    folder = Path(cache_dir)
    read_meta(folder)  # before a lock is left in a folder that is no cache
    store, deleted = PartStore(folder), Counter()
    with deleting(folder):
        meta = read_meta(folder)
        keep = {store.path("text", key) for key in meta["empty_text"].values()}
        for index in folder.glob("index-*.jsonl"):
            entries = read_index(folder, index.stem.removeprefix("index-"), meta)
            keep |= {store.path(*file) for entry in entries for file in entry.parts.files()}
        for path in [path for part in store.part_names() for path in (folder / part).glob("*")]:
            # Nothing but what a cache writes: a part's folder may be a link to where other things are too.
            named = KEY.fullmatch(path.stem) and path.suffix in (".safetensors", DAMAGED)
            if named and path not in keep and not (path.is_dir() and not path.is_symlink()):
                deleted.update(count=1, bytes=path.lstat().st_size)
                path.unlink()
    return Files(deleted["count"], deleted["bytes"])
