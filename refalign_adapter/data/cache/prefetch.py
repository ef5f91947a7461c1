"""The next items are read while the current one is computed: in a thread, or in worker processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from ...errors import ReadError, UserError

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


def in_workers(work: Dataset[Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """As `loaded`, and read ahead in any case: with 0 workers by a thread of this process."""
    done = loaded(work, items, workers)
    return done if workers else read_ahead(done)


def loaded(work: Dataset[Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """`work[item]` of each item in order, done ahead by so many processes; 0: here, when it is asked for.

    Workers are sent each item as they come to it: from a list they would in time copy all of it, each for itself. A
    `UserError` comes out where the item would have, as it is and not as the text of a worker's traceback.
    """
    given: Any = items
    for item in DataLoader(_Telling(work), batch_size=None, sampler=given, num_workers=workers, collate_fn=_as_it_is):
        if isinstance(item, UserError):
            raise item
        yield item


class _Telling(Dataset[Any]):
    """Hands over a user's mistake in place of the item: what a worker raises arrives as a text with its traceback."""

    def __init__(self, work: Dataset[Any]):
        self.work = work

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.work[item]
        except UserError as error:
            return error.with_traceback(None)


@contextmanager
def workers_told(field: str) -> Iterator[None]:
    """Around all that goes on while workers read: one that is killed raises wherever the main process happens to be.

    Args:
        field: what says how many there are.

    Raises:
        ReadError: one was killed.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if not reason.startswith("DataLoader worker"):
            raise
        raise ReadError(f"{field}: {reason.rstrip('.')}; if memory ran out, lower {field}") from None


def _as_it_is(item: Any) -> Any:
    return item
