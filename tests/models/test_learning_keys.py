"""The keys that learn more of a token: what they compute, where they start, and what refuses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.models.base import build
from treadle.training.optim import Optimizers
from treadle.training.settings import OptimSettings

SMALL: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}


def batch(rows: int = 2, length: int = 12) -> Batch:
    return Batch.for_training(torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(1)))


def test_relu2_is_the_square_of_what_is_positive() -> None:
    model = build("transformer", **SMALL, mlp="relu2")
    mlp, x = model.blocks()[0].mlp, torch.randn(2, 5, 32)  # type: ignore
    assert model.config.inner == 4 * 32
    torch.testing.assert_close(mlp(x), mlp.down(torch.where(mlp.up(x) > 0, mlp.up(x), 0.0) ** 2))  # type: ignore


def test_the_names_that_others_use_choose_relu2_and_the_cap() -> None:
    model = build("transformer", **SMALL, hidden_act="relu2", logit_softcap=5.0)
    assert model.config.mlp == "relu2" and model.config.style == "llama" and model.logit_softcap == 5.0


def test_relu2_costs_the_operations_of_two_matrices() -> None:
    gated, plain = (build("transformer", **SMALL, intermediate_size=64, mlp=mlp) for mlp in ("swiglu", "relu2"))
    assert gated.flops(8) - plain.flops(8) == 3 * 2 * 8 * 32 * 64


def test_value_embeddings_are_in_every_other_block_and_the_last() -> None:
    model = build("transformer", **SMALL, value_embeddings=True)
    assert [block.attention.value_embedding is not None for block in model.blocks()] == [True, False, True]  # type: ignore
    plain = build("transformer", **SMALL)
    assert model.parameter_count() - plain.parameter_count() == 2 * (61 * 16 + 2 * 32)


def test_a_value_is_the_projection_plus_the_gated_vector_of_its_token() -> None:
    model = build("transformer", **SMALL, value_embeddings=True)
    attention, rows = model.blocks()[2].attention, batch()  # type: ignore
    with torch.no_grad():
        attention.value_gate.weight.normal_()  # type: ignore
    x, context = torch.randn(2, 12, 32), model.context(rows, None)  # type: ignore
    found = attention._values(attention.value(x), x, context)  # type: ignore
    gates = 2 / (1 + torch.exp(-x @ attention.value_gate.weight.T))  # type: ignore
    own = attention.value_embedding.weight[rows.input_ids].view(2, 12, 2, 8)  # type: ignore
    wanted = attention.value(x).view(2, 12, 2, 8) + gates[..., None] * own  # type: ignore
    torch.testing.assert_close(found, wanted.transpose(1, 2))


def test_no_value_embedding_is_a_matrix_to_muon_or_decays() -> None:
    model = build("transformer", **SMALL, value_embeddings=True)
    muon, adamw = Optimizers(model, OptimSettings(name="muon")).inner
    of_muon = [name for group in muon.param_groups for name in group["names"]]
    assert of_muon and not any("value_embedding" in name or "value_gate" in name for name in of_muon)
    decay = {name: group["weight_decay"] for group in adamw.param_groups for name in group["names"]}
    assert decay["layers.0.attention.value_embedding.weight"] == 0.0


def test_blocks_that_start_at_zero_add_nothing() -> None:
    rows, model = batch(), build("transformer", **SMALL, zero_init_residual=True)
    x = model.embedding(rows.input_ids)  # type: ignore
    torch.testing.assert_close(model.hidden(rows).hidden, model.norm(x))  # type: ignore


def test_a_shifted_embedding_has_a_share_of_the_one_before_in_its_document() -> None:
    model = build("transformer", **SMALL, token_shift=True)
    with torch.no_grad():
        model.token_shift.gate.weight.normal_()  # type: ignore
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [-1] * 3])
    rows = Batch.for_training(batch().input_ids, documents)
    x = model.embedding(rows.input_ids)  # type: ignore
    found = model.embed(rows, model.context(rows, None))  # type: ignore
    for row, t in [(0, 0), (0, 5), (1, 0)]:
        torch.testing.assert_close(found[row, t], x[row, t])
    for row, t in [(0, 1), (0, 6), (1, 8)]:
        share = torch.sigmoid(x[row, t] @ model.token_shift.gate.weight[0])  # type: ignore
        torch.testing.assert_close(found[row, t], x[row, t] + share * x[row, t - 1])


def test_a_shift_goes_on_over_padding_from_its_state() -> None:
    model = build("transformer", **SMALL, token_shift=True).eval()
    with torch.no_grad():
        model.token_shift.gate.weight.normal_()  # type: ignore
    ids = batch(1, 7).input_ids
    whole = model(Batch.from_ids(ids)).logits
    state, padded = model.new_state(1, 16), torch.full((1, 12), 3)
    at = torch.tensor([1, 2, 6, 8, 9])
    padded[0, at] = ids[0, :5]
    documents = torch.full((1, 12), -1)
    documents[0, at] = 0
    out = model(Batch.from_ids(padded, documents), state)
    torch.testing.assert_close(out.logits[0, at], whole[0, :5])
    for t in (5, 6):
        out = model(Batch.from_ids(ids[:, t : t + 1]), out.state)
        torch.testing.assert_close(out.logits[0, 0], whole[0, t])


@pytest.mark.parametrize("types, having", [(["attention", "attention", "ssd"], [0]), (["attention", "ssd", "attention"], [0, 2]), (["ssd"], [])])
def test_value_embeddings_are_of_attention_alone(types: list[str], having: list[int]) -> None:
    """So a recipe with them trains with any mixer."""
    model = build("transformer", **SMALL, value_embeddings=True, layer_types=types)
    named = {int(name.split(".")[1]) for name, _ in model.named_parameters() if name.endswith("value_embedding.weight")}
    assert sorted(named) == having
    assert model(batch()).logits.isfinite().all()


@pytest.mark.parametrize("keys", [{"mlp": "relu2"}, {"value_embeddings": True}])
def test_no_hugging_face_family_holds_them(keys: dict[str, Any], tmp_path: Path) -> None:
    from treadle.models.huggingface.config import written

    with pytest.raises(ConfigError, match="relu2" if "mlp" in keys else "value_embeddings = True"):
        written(build("transformer", **SMALL, **keys).config)
    written(build("transformer", **SMALL, zero_init_residual=True).config)
