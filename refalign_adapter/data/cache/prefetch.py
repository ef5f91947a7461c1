"""The next items are read while the current one is computed: in a thread, or in worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

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


def in_workers(work: Dataset[Any], items: list[Any], workers: int) -> Iterator[Any]:
    """`work[item]` of each item in order, done ahead by so many processes; 0: by a thread of this one.

    Workers are sent each item as they come to it: from a list they would in time copy all of it, each for itself.
    """
    given: Any = items
    loader = DataLoader(work, batch_size=None, sampler=given, num_workers=workers, collate_fn=_as_it_is)
    return iter(loader) if workers else read_ahead(iter(loader))


def _as_it_is(item: Any) -> Any:
    return item
