"""Recall probes: every label can be read off its row, and nothing else has one."""

from __future__ import annotations

import numpy as np
import pytest

from treadle.data.batch import IGNORE
from treadle.data.probes import PROBES, ProbeKeys, Probes
from treadle.errors import ConfigError


def rows(probe: str, split: str = "train", seed: int = 0, count: int = 64) -> tuple[np.ndarray, np.ndarray]:
    batch = Probes(ProbeKeys(probe=probe, probe_length=8, probe_symbols=20), seed, split).generate(np.arange(count))  # type: ignore[arg-type]
    assert batch.labels is not None
    return batch.input_ids.numpy(), batch.labels.numpy()


def answer(probe: str, seen: list[int]) -> int:
    """What follows, from the row alone."""
    if probe == "copy":
        return seen[len(seen) - 1 - 8]
    last = seen[-1]
    return seen[max(place for place in range(len(seen) - 1) if seen[place] == last) + 1]


@pytest.mark.parametrize("probe", PROBES)
def test_each_label_follows_from_its_row(probe: str) -> None:
    ids, labels = rows(probe)
    asked = {"copy": [8] * 64, "associative_recall": [8] * 64}.get(probe)
    counts = (labels != IGNORE).sum(1).tolist()
    assert counts == asked if asked else (min(counts) >= 8 and max(counts) <= 12)
    for row, wanted in zip(ids, labels):
        for place in np.flatnonzero(wanted != IGNORE):
            assert answer(probe, row[: place + 1].tolist()) == wanted[place]


@pytest.mark.parametrize("probe", PROBES)
def test_rows_are_their_own_seeds_and_splits(probe: str) -> None:
    assert np.array_equal(rows(probe)[0], rows(probe)[0]) and not np.array_equal(rows(probe)[0], rows(probe, seed=1)[0])
    held = rows(probe, "validation")[0]
    assert np.array_equal(held, rows(probe, "validation", seed=5)[0]) and not np.array_equal(held, rows(probe)[0])


def test_more_than_there_are_different_symbols_is_refused() -> None:
    with pytest.raises(ConfigError, match="--probe_length 4"):
        Probes(ProbeKeys(probe="associative_recall", probe_length=5, probe_symbols=8))
