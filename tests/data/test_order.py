"""The order of rows: keyed permutations, shares of sources, schedules of them."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import make_text
from treadle.data.base import BatchPlan
from treadle.data.dataset import TokenDataset as Dataset
from treadle.data.order import Order, key, permute, step_draws
from treadle.errors import ConfigError


@given(st.integers(1, 50_000), st.integers(0, 2**64 - 1))
@settings(max_examples=40, deadline=None)
def test_permutations_are_bijective(size: int, seed: int) -> None:
    assert sorted(permute(np.arange(size), size, seed).tolist()) == list(range(size))


def test_large_permutations_are_reached_in_constant_time_and_look_random() -> None:
    size = 10**12 + 7
    index = np.arange(size - 4000, size)
    image = permute(index, size, 3)
    assert image.min() >= 0 and image.max() < size and len(set(image.tolist())) == 4000
    assert abs(np.corrcoef(index, image)[0, 1]) < 0.1
    assert not np.array_equal(image, permute(index, size, 4))


def test_order_is_random_between_epochs_and_complete_in_each() -> None:
    order = Order((700, 323), seed=1)
    epochs = [list(zip(*(a.tolist() for a in order.draws(np.arange(e * 1023, (e + 1) * 1023))))) for e in range(3)]
    for epoch in epochs:
        assert Counter(epoch) == Counter([(0, r) for r in range(700)] + [(1, r) for r in range(323)])
    assert epochs[0] != epochs[1] != epochs[2]
    rows = [r + 700 * s for s, r in epochs[0]]
    assert abs(np.corrcoef(np.arange(1023), rows)[0, 1]) < 0.1


@pytest.mark.parametrize("world", [1, 2, 4])
def test_world_sizes_see_the_same_global_batches(world: int) -> None:
    order = Order((1000,), seed=0, weights=None)
    whole = order.draws(step_draws(7, 16))[1]
    parts = np.concatenate([order.draws(step_draws(7, 16, rank, world))[1] for rank in range(world)])
    assert np.array_equal(whole, parts)


def test_mixing_holds_exact_quotas_and_seeks() -> None:
    order = Order((50, 500, 5000), seed=2, weights=(1, 2, 5))
    source, row = order.draws(np.arange(8 * 1024))
    for block in range(8):
        assert Counter(source[block * 1024 : (block + 1) * 1024].tolist()) == {0: 128, 1: 256, 2: 640}
    for s, size in enumerate(order.sizes):  # each source runs through its own rows evenly
        counts = Counter(row[source == s].tolist())
        assert max(counts.values()) - min(counts.get(r, 0) for r in range(size)) <= 1
    again = order.draws(np.array([5000, 17, 8191]))
    assert (
        again[0].tolist() == source[[5000, 17, 8191]].tolist() and again[1].tolist() == row[[5000, 17, 8191]].tolist()
    )


def test_weights_change_by_a_schedule_of_steps() -> None:
    """Exact shares in the blocks of each set of weights, rows of a source counted on over all of them, any draw in O(1)."""
    batch = 16
    order = Order((50, 500, 70), seed=2, weights=((0, 0.9, 0.1, 0), (100, 0.25, 0.25, 0.5), (130, 0, 1, 0)), global_batch=batch)
    numbers = np.arange(300 * batch)
    source, row = order.draws(numbers)
    first, second = source[: 100 * batch], source[100 * batch : 130 * batch]
    assert Counter(first[:1024].tolist()) == {0: 922, 1: 102} and not (first == 2).any()
    assert abs(Counter(second.tolist())[2] / len(second) - 0.5) < 0.03 and set(source[130 * batch :].tolist()) == {1}
    for s, size in enumerate(order.sizes):  # each source runs through its own rows evenly, over every change
        counts = Counter(row[source == s].tolist())
        assert max(counts.values()) - min(counts.get(r, 0) for r in range(size)) <= 1
    picked = np.array([17, 1599, 1600, 1700, 2079, 2080, 4000])
    for found, wanted in zip(order.draws(picked), (source, row)):
        assert found.tolist() == wanted[picked].tolist()
    for end in (0, 1, 1024, 1600, 1999, 2080, 4321):
        assert order.mixture.counts(end).tolist() == [int((source[:end] == s).sum()) for s in range(3)]
    longer = Order(order.sizes, seed=2, weights=(*order.weights, (400, 1, 1, 1)), global_batch=batch)  # type: ignore[misc]
    assert longer.draws(numbers)[1].tolist() == row.tolist()


@pytest.mark.parametrize("weights", [[[0, 1, 2], [5, 1]], [[3, 1, 2]], [[0, 1, 2], [0, 2, 1]], [[0, 0, 1], [9, 0, 1]], [1, -1], [[0, 0, 0]]])
def test_wrong_schedules_are_refused(weights: list) -> None:
    with pytest.raises(ConfigError, match="weight"):
        Dataset.load([__file__, __file__], tokenizer="byte", weights=weights)


def test_another_epoch_of_a_small_source_is_said(tmp_path: Path) -> None:
    for name, lines in (("small", 20), ("large", 400)):
        (tmp_path / f"{name}.txt").write_text(make_text(lines))
    data = Dataset.load([tmp_path / "small.txt", tmp_path / "large.txt"], tokenizer="byte", seq_len=32, weights=[1, 1])
    plan, said = BatchPlan(0, 16), []
    for _, position in itertools.islice(data.batches(0, plan), 64):
        said += data.news(position, plan)
    size = len(data.parts[0])  # type: ignore[attr-defined]
    assert len(said) == (512 - 1) // size and said[0] == f"{tmp_path}/small.txt: epoch 2 begins"


def test_surplus_draws_are_masked() -> None:
    order = Order((10,), seed=0, end=20)
    _source, row = order.draws(np.arange(16, 24))
    assert (row[:4] >= 0).all() and (row[4:] == -1).all()


def test_keys_differ() -> None:
    assert len({key(), key(0), key(0, 0), key(1), key(0, 1), key(1, 0)}) == 6
