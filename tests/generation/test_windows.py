"""Continuous batching of models with sliding windows: rows of any lengths share a state, and get what they get alone."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from tests.generation.test_engine import Heard, alone
from treadle.data.batch import Batch
from treadle.generation.engine import Engine
from treadle.models.base import build

TYPES = ["sliding_attention", "full_attention"]


def windowed(window: int, **keys: Any) -> Any:
    shape = {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "initializer_range": 0.2}
    return build("transformer", seed=1, **{**shape, "layer_types": TYPES, "sliding_window": window, **keys}).eval()


@pytest.mark.parametrize(("window", "rows"), [(1, 3), (16, 1), (16, 4), (64, 2), (400, 4)])
def test_rows_shorter_and_longer_than_the_window(window: int, rows: int) -> None:
    """Together they run within the window, go over it, and make the state larger and smaller."""
    model = windowed(window)
    engine = Engine(model, rows=rows, max_len=512, prompt_tokens=16)
    sizes = [(10, 5), (20, 5), (20, 30), (3, 20), (50, 2), (1, 1), (16, 16), (130, 9), (2, 9)]
    asked = [Heard(engine, [(5 + number) * place % 61 for place in range(size)], count) for number, (size, count) in enumerate(sizes)]
    engine.start()
    for heard in asked:
        request = heard.ticket.request
        assert (heard.wait().reasons, heard.ids) == (["length"], alone(model, request.prompt_ids, request.max_new_tokens))
    assert engine.stop(timeout=30)


@pytest.mark.parametrize("window", [4, 16, 64])
def test_a_state_goes_on_in_a_larger_one(window: int) -> None:
    """What growing a cache does: the same logits, whether the smaller ring, the larger, or none of them turns."""
    model = windowed(window)
    ids = torch.arange(90)[None] * 7 % 61
    for small, read in ((3, 3), (10, 10), (20, 12), (40, 40)):
        with torch.no_grad():
            state = model(Batch.from_ids(ids[:, :read]), state=model.new_state(1, small)).state
            larger = model.new_state(2, 90)
            larger.put([1], state)
            found = model(Batch.from_ids(ids[:, read:].expand(2, -1)), state=larger).logits[1]
            torch.testing.assert_close(found, model(Batch.from_ids(ids)).logits[0, read:], rtol=1e-4, atol=1e-4)


def test_a_place_that_cannot_be_made_ends_its_own_requests_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = windowed(16)
    engine = Engine(model, rows=3, max_len=300)
    good = Heard(engine, [4, 5], 150)
    engine.start()
    while len(good.tokens) < 3:
        time.sleep(0.001)
    new_state = model.new_state

    def small_machine(rows: int, max_len: int, *more: Any) -> Any:
        if rows > 1:
            raise MemoryError("no memory")
        return new_state(rows, max_len, *more)

    monkeypatch.setattr(model, "new_state", small_machine)
    assert Heard(engine, [6, 7], 5).wait().reasons == ["error: no memory"]
    monkeypatch.undo()
    assert Heard(engine, [6, 7], 5).wait().reasons == ["length"]
    assert good.wait().reasons == ["length"] and good.ids == alone(model, [4, 5], 150)
    assert engine.stop(timeout=30)


@pytest.mark.parametrize("kind", [{}, {"layer_types": None}], ids=["ring", "cache"])
def test_numbers_that_are_none_stay_in_their_own_request(kind: dict[str, Any]) -> None:
    """Their keys and values lie in a place that another request takes afterwards."""
    model, never = windowed(8, tie_embeddings=False, **kind), {5: -100.0}
    with torch.no_grad():
        model.embedding.weight[5] = torch.nan
    engine = Engine(model, rows=3, max_len=128)  # of which two stay, so that the state is not made smaller
    long = [Heard(engine, [number] * 20, 20, logit_bias=never) for number in (1, 7)]
    bad = Heard(engine, [1] * 15 + [5], 5)
    after = [Heard(engine, [number], 4, logit_bias=never) for number in (2, 3)]
    engine.start()
    assert bad.wait().reasons == ["error: the model's logits are not finite numbers"]
    assert [heard.wait().reasons for heard in (*long, *after)] == [["length"]] * 4
    assert engine.stop(timeout=30)
