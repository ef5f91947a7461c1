"""The next item is read while the current one is computed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
_END = object()


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items in the same order, each asked for in a thread as soon as the one before is taken.

    What `items` raises comes out where the item would have. One item more than was taken may have been read: count
    what is taken, as `training.loop.endless_batches` does, and a run can be taken up exactly.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:
        coming = thread.submit(next, items, _END)
        while (item := coming.result()) is not _END:
            coming = thread.submit(next, items, _END)
            yield item  # type: ignore[misc]  # the end's mark is told apart above
