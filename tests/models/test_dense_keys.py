"""The keys by which dense families differ: what they compute, and that none of them costs a model without it anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.layers.rope import SCALINGS
from treadle.models.base import build
from treadle.objectives.next_token import NextToken
from treadle.ops.attention import attention_reference, causal_attention
from treadle.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from treadle.ops.sliding_window_attention import sliding_window_attention_reference

SMALL: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
SLIDING: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(1))


def saved_bytes(length: int, **keys: Any) -> int:
    """What autograd keeps of one forward pass over a row."""
    model = build("transformer", **{**SMALL, **keys}).train()
    weights = {p.data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            seen[tensor.data_ptr()] = max(seen.get(tensor.data_ptr(), 0), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model.hidden(Batch.from_ids(ids(1, length))).hidden.sum()  # type: ignore[union-attr]
    del loss
    return sum(seen.values())


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_saved_memory_of_sliding_windows_is_linear(softcap: float | None) -> None:
    keys = {"layer_types": ["sliding_attention"], "sliding_window": 64, "attn_logit_softcapping": softcap}
    assert saved_bytes(2048, **keys) <= 2.2 * saved_bytes(1024, **keys)
    assert saved_bytes(2048, **keys) < saved_bytes(2048, attn_logit_softcapping=softcap) / 2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [3, 40, 130, 300])
def test_windows_by_query_blocks_are_the_masked_reference(window: int, packed: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 290, 8, requires_grad=True) for heads in (4, 2, 2))
    segments = ((160, 130), (290,)) if packed else ((290,), (290,))
    doc_ids = torch.tensor([[0] * row[0] + [1] * (290 - row[0]) for row in segments]) if packed else None
    found = causal_attention(q, k, v, doc_ids=doc_ids, segments=segments if packed else None, window=window)
    wide = [t.repeat_interleave(2, 1) for t in (k, v)]
    wanted = sliding_window_attention_reference(q, *wide, window, doc_ids)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(wanted)
    ours = torch.autograd.grad((found * weight).sum(), (q, k, v), retain_graph=True)
    theirs = torch.autograd.grad((wanted * weight).sum(), (q, k, v))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_softcaps_of_both_attention_paths_agree() -> None:
    torch.manual_seed(0)
    q, k, v = (3 * torch.randn(1, 2, 20, 8) for _ in range(3))
    full = attention_reference(q, k, v, softcap=2.0)
    torch.testing.assert_close(full[:, :, :7], causal_attention(q, k, v, window=7, softcap=2.0)[:, :, :7], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(full, attention_reference(q, k, v), atol=1e-2)


def test_cross_entropy_of_capped_logits_is_the_reference() -> None:
    torch.manual_seed(0)
    hidden, weight = 3 * torch.randn(2, 150, 8), torch.randn(61, 8)
    labels = ids(2, 150)
    labels[0, :5] = -100
    found = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(h, w, labels, softcap=3.0)
        found.append((loss, *torch.autograd.grad(loss, (h, w))))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_the_loss_of_a_model_with_capped_logits_is_that_of_its_logits() -> None:
    model = build("transformer", **SMALL, final_logit_softcapping=0.5, initializer_range=0.5).eval()
    batch = Batch.for_training(ids(2, 16))
    logits = model(batch).logits
    assert logits is not None and batch.labels is not None and float(logits.detach().abs().max()) <= 0.5
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum", ignore_index=-100)
    torch.testing.assert_close(NextToken()(model, batch).losses["next_token"].total, nats, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"layer_types": ["local"]}, "sliding_window"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 1.0}}, "beta_fast"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor"),
        ({"partial_rotary_factor": 0.4}, "partial_rotary_factor"),
        ({"head_dim": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_keys_that_do_not_fit_are_named(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build("transformer", **SMALL, **keys)


def test_scalings_are_documented_kinds() -> None:
    assert set(SCALINGS) == {"linear", "dynamic", "llama3", "yarn"}


def test_models_without_these_keys_have_the_parameters_they_had() -> None:
    names = [name for name, _ in build("transformer", **SMALL, qk_norm=True).named_parameters() if ".1." not in name]
    inside = ("attention_norm", "attention.query", "attention.key", "attention.value", "attention.out", "attention.query_norm",
              "attention.key_norm", "mlp_norm", "mlp.gate", "mlp.up", "mlp.down")  # fmt: skip
    assert names == ["embedding.weight", *(f"layers.0.{one}.weight" for one in inside), "norm.weight"]
