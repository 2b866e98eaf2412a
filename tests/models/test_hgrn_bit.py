"""The flat ternary recurrence: exact decoding, packing and padding, the preset, a pattern learned."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import treadle
from tests.models.rows import ids, packed_and_alone
from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.models.base import Model, parameter_count
from treadle.models.hgrn_bit import HGRNBit, HGRNBitConfig
from treadle.objectives.next_token import NextToken


def small(seed: int = 0, **keys: Any) -> Model:
    return treadle.build("hgrn_bit", seed=seed, **{"vocab_size": 256, "hidden_size": 48, "num_layers": 2, **keys}).eval()


@pytest.mark.parametrize("seed", range(10))
def test_decoding_is_the_full_forward_bit_for_bit(seed: int) -> None:
    model = small(seed)
    for rows in (1, 3):
        tokens = ids(rows, 48, seed)
        with torch.no_grad():
            full = model(Batch.from_ids(tokens)).logits
            for prefix in (1, 16, 47):
                out = model(Batch.from_ids(tokens[:, :prefix]), state=model.new_state(rows, 48))
                assert torch.equal(out.logits, full[:, :prefix])
                for t in range(prefix, 48):
                    out = model(Batch.from_ids(tokens[:, t : t + 1]), state=out.state)
                    assert torch.equal(out.logits[:, 0], full[:, t]), (prefix, t)


@pytest.mark.parametrize("keys", [{}, {"convolution_size": 4}])
def test_packed_and_padded_rows_are_the_documents_themselves(keys: dict[str, Any]) -> None:
    assert all(torch.equal(packed, alone) for packed, alone in packed_and_alone(small(**keys)))


def test_a_copy_has_weights_of_its_own() -> None:
    model, batch = small(), Batch.from_ids(ids(1, 20))
    model.generate(ids(1, 4), 4)
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = model(batch).logits
        other.layers[0].mlp.down.weight.mul_(-1)
        assert not torch.equal(other(batch).logits, before) and torch.equal(model(batch).logits, before)


def test_the_state_does_not_grow() -> None:
    model = small(convolution_size=4)
    assert model.state_bytes(1, 100) == model.state_bytes(1, 4000) == model.new_state(1, 4000).nbytes


def test_the_preset_has_its_number_of_parameters() -> None:
    assert parameter_count(HGRNBit, HGRNBitConfig.with_preset("slm_base")) == 25_465_856


def test_a_cycle_is_learned_and_shifted_once() -> None:
    """32 tokens in a circle: the next one is the answer, not the one after it."""
    torch.manual_seed(0)
    model = treadle.build("hgrn_bit", vocab_size=256, hidden_size=64, num_layers=2).train()
    cycle = torch.randperm(256, generator=torch.Generator().manual_seed(1))[:32]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    objective = NextToken()
    for step in range(120):
        starts = torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(step))
        rows = torch.stack([cycle[(torch.arange(48) + s) % 32] for s in starts.tolist()])
        batch = Batch.for_training(rows)
        loss = objective(model, batch).losses["next_token"].total / batch.counts["labels"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    test = torch.stack([cycle[(torch.arange(49) + s) % 32] for s in range(32)])
    with torch.no_grad():
        found = model.eval()(Batch.from_ids(test[:, :-1])).logits.argmax(-1)
    assert (found == test[:, 1:]).float().mean() >= 0.99


def test_bad_shapes_say_what_to_type() -> None:
    for keys, words in (({"num_heads": 5}, "num_heads"), ({"tie_embeddings": True}, "--ternary false"),
                        ({"convolution_size": 1}, "4")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            small(**keys)
