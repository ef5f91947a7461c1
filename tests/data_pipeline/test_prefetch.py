"""Reading ahead changes neither items nor order nor errors, and does run ahead."""

import itertools
import threading

import pytest

from refalign_adapter.data.cache.prefetch import read_ahead


def test_items_come_in_order_and_to_the_end():
    assert list(read_ahead(iter(range(5)))) == [0, 1, 2, 3, 4]
    assert list(read_ahead(iter(()))) == []
    assert list(read_ahead(iter([None, None]))) == [None, None]


def test_one_item_is_read_ahead_and_no_more():
    read, started = [], threading.Event()

    def items():
        for number in itertools.count():
            read.append(number)
            if number == 1:
                started.set()
            yield number

    ahead = read_ahead(items())
    assert next(ahead) == 0
    assert started.wait(10)
    assert read == [0, 1]
    ahead.close()
    assert read == [0, 1]


def test_an_error_comes_where_its_item_would_have():
    def items():
        yield 1
        raise ValueError("damaged")

    ahead = read_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(ahead)
