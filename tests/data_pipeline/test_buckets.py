"""The batch sampler: one shape a batch, the same order for a seed, nothing lost, taken up anywhere."""

from collections import Counter
from itertools import islice

import pytest

from refalign_adapter.data.cache.buckets import BucketBatchSampler
from refalign_adapter.errors import UserError

SHAPES = ["a"] * 10 + ["b"] * 7 + ["c"] * 2


def epochs(sampler, count):
    return [list(sampler) for _ in range(count)]


def forever(sampler):
    while True:
        yield from sampler


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("drop_last", [True, False])
def test_batches_have_one_shape_on_all_processes(world_size, drop_last):
    samplers = [
        BucketBatchSampler(SHAPES, 2, seed=3, rank=rank, world_size=world_size, drop_last=drop_last)
        for rank in range(world_size)
    ]
    for steps in zip(*samplers, strict=True):
        assert len({SHAPES[index] for batch in steps for index in batch}) == 1
        assert len({len(batch) for batch in steps}) == 1
        assert all(1 <= len(batch) <= 2 for batch in steps)
    assert all(len(list(sampler)) == len(sampler) for sampler in samplers)


def test_an_epoch_serves_what_fills_batches_and_small_shapes_by_repetition():
    sampler = BucketBatchSampler(SHAPES, 3, seed=0)
    seen = Counter(index for batch in sampler for index in batch)
    by_shape = Counter()
    for index, count in seen.items():
        by_shape[SHAPES[index]] += count
    assert by_shape == {"a": 9, "b": 6, "c": 3}
    assert max(count for index, count in seen.items() if SHAPES[index] != "c") == 1
    assert set(seen) >= {17, 18}


def test_what_an_epoch_leaves_out_comes_in_others():
    sampler = BucketBatchSampler(SHAPES, 4, seed=0)
    seen = {index for epoch in epochs(sampler, 12) for batch in epoch for index in batch}
    assert seen == set(range(len(SHAPES)))


def test_without_drop_last_every_sample_is_served_once():
    sampler = BucketBatchSampler(SHAPES, 4, seed=0, drop_last=False)
    batches = list(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(len(SHAPES)))
    assert sorted(map(len, batches)) == [2, 2, 3, 4, 4, 4]


def test_processes_divide_an_epoch_among_themselves():
    alone = [sorted(batch) for batch in BucketBatchSampler(SHAPES, 4, seed=5)]
    pair = [BucketBatchSampler(SHAPES, 2, seed=5, rank=rank, world_size=2) for rank in range(2)]
    assert [sorted(one + other) for one, other in zip(*pair, strict=True)] == alone


def test_seed_and_epoch_decide_the_order():
    orders = epochs(BucketBatchSampler(SHAPES, 2, seed=1), 3)
    assert orders == epochs(BucketBatchSampler(SHAPES, 2, seed=1), 3)
    assert orders[0] != orders[1]
    assert orders[0] != epochs(BucketBatchSampler(SHAPES, 2, seed=2), 1)[0]


@pytest.mark.parametrize("taken", [0, 1, 5, 8, 9, 13])
def test_resuming_anywhere_gives_the_same_batches_as_going_on(taken):
    whole = list(islice(forever(BucketBatchSampler(SHAPES, 2, seed=1)), 30))
    sampler = BucketBatchSampler(SHAPES, 2, seed=1)
    stream = forever(sampler)
    assert list(islice(stream, taken)) == whole[:taken]
    resumed = BucketBatchSampler(SHAPES, 2, seed=1)
    resumed.load_state_dict(sampler.state_dict())
    assert list(islice(forever(resumed), 30 - taken)) == whole[taken:]


def test_a_position_that_the_epoch_does_not_have_is_refused():
    sampler = BucketBatchSampler(SHAPES, 2, seed=1)
    with pytest.raises(UserError, match="position 99 of 9 batches an epoch"):
        sampler.load_state_dict({"epoch": 0, "position": 99})


def test_too_few_samples_are_told():
    with pytest.raises(UserError, match=r"a step takes 20 samples \(20\), but there are only 19; lower"):
        BucketBatchSampler(SHAPES, 20, seed=0)
    with pytest.raises(
        UserError, match=r"a step takes 20 samples \(10 on each of 2 processes\), but there are only 19"
    ):
        BucketBatchSampler(SHAPES, 10, seed=0, world_size=2)
    with pytest.raises(UserError, match="there are no samples"):
        BucketBatchSampler([], 1, seed=0)
    with pytest.raises(UserError, match="train_batch_size must be at least 1"):
        BucketBatchSampler(SHAPES, 0, seed=0)


MIXED_SHAPES = ["a"] * 30 + ["b"] * 10 + ["a"] * 8 + ["b"] * 12
MIXED_SOURCES = [0] * 40 + [1] * 20


@pytest.mark.parametrize("ratios", [(6, 4), (1, 3), (0.5, 0.5)])
def test_sources_are_mixed_by_their_ratio_in_every_shape_alike(ratios):
    sampler = BucketBatchSampler(MIXED_SHAPES, 1, seed=0, sources=MIXED_SOURCES, ratios=ratios)
    wanted = [60 * ratio / sum(ratios) for ratio in ratios]
    for batches in epochs(sampler, 3):
        drawn = Counter((MIXED_SOURCES[index], MIXED_SHAPES[index]) for (index,) in batches)
        for source, rows in ((0, {"a": 30, "b": 10}), (1, {"a": 8, "b": 12})):
            for shape, count in rows.items():
                assert abs(drawn[source, shape] - wanted[source] * count / sum(rows.values())) <= 0.5
        assert len(batches) == len(sampler)


def test_a_source_that_gives_more_than_it_has_repeats_all_alike_and_one_that_gives_less_alternates():
    sampler = BucketBatchSampler(["a"] * 50, 1, seed=1, sources=[0] * 40 + [1] * 10, ratios=[1, 1])
    seen, small = Counter(), Counter(index for (index,) in next(iter(epochs(sampler, 1))))
    assert sum(count for index, count in small.items() if index >= 40) == 25
    assert {count for index, count in small.items() if index >= 40} == {2, 3}
    for batches in epochs(sampler, 12):
        seen.update(index for (index,) in batches)
    assert set(seen) == set(range(50))


def test_a_mixed_order_is_taken_up_anywhere_and_shared_out():
    make = lambda **more: BucketBatchSampler(  # noqa: E731
        MIXED_SHAPES, 2, seed=4, sources=MIXED_SOURCES, ratios=[6, 4], **more
    )
    whole = list(islice(forever(make()), 70))
    for position in (1, 29, len(make()) - 1):
        sampler = make()
        sampler.load_state_dict({"epoch": 1, "position": position})
        start = len(make()) + position
        assert list(islice(forever(sampler), 5)) == whole[start : start + 5]
    for steps in zip(make(rank=0, world_size=2), make(rank=1, world_size=2), strict=True):
        assert len({MIXED_SHAPES[index] for batch in steps for index in batch}) == 1


def test_equal_ratios_per_row_and_no_ratios_both_serve_every_sample():
    plain = BucketBatchSampler(SHAPES, 1, seed=2)
    unmixed = BucketBatchSampler(SHAPES, 1, seed=2, sources=[0] * len(SHAPES), ratios=[3.0])
    assert list(plain) == list(unmixed)
    assert sorted(index for (index,) in epochs(plain, 1)[0]) == list(range(len(SHAPES)))


def test_a_source_without_rows_leaves_the_others_their_ratio():
    sampler = BucketBatchSampler(["a"] * 20, 1, seed=0, sources=[0] * 10 + [2] * 10, ratios=[3, 5, 1])
    drawn = Counter(index // 10 for (index,) in sampler)
    assert drawn == {0: 15, 1: 5}
