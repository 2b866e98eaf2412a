"""State-space students: the chunked scan, the window, and a decoding state that does not grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import treadle
from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.models.base import Model
from treadle.ops.sliding_window_attention import sliding_window_attention, sliding_window_attention_reference
from treadle.ops.ssd import ssd, ssd_reference, step

from .test_shc import ids, logits, shaken


def inputs(length: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    rows, heads, width, inner = 2, 3, 4, 5
    x = torch.randn(rows, heads, length, width, generator=g, dtype=dtype)
    decay = -torch.rand(rows, heads, length, generator=g, dtype=dtype)
    b, c = (torch.randn(rows, heads, length, inner, generator=g, dtype=dtype) for _ in range(2))
    return [x, decay, b, c]


DOCUMENTS = torch.tensor([[0] * 20 + [1] * 75 + [-1] * 5, [0] * 3 + [1] * 63 + [2] * 34])


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one", "packed"])
@pytest.mark.parametrize("chunk", [None, 1, 7, 16, 100])
def test_chunks_are_the_recurrence(chunk: int | None, documents: torch.Tensor | None) -> None:
    found, wanted = ([t.clone().requires_grad_() for t in inputs(100)] for _ in range(2))
    ours, theirs = ssd(*found, documents, chunk=chunk), ssd_reference(*wanted, documents)
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() <= 1e-10
    sum(t.square().sum() for t in ours).backward()
    sum(t.square().sum() for t in theirs).backward()
    for a, b in zip(found, wanted):
        assert (a.grad - b.grad).abs().max() <= 1e-8


def test_a_state_goes_on_and_a_step_is_a_position() -> None:
    x, decay, b, c = inputs(70, torch.float32)
    whole, last = ssd(x, decay, b, c)
    _, state = ssd(*(t[:, :, :33] for t in (x, decay, b, c)))
    rest, end = ssd(*(t[:, :, 33:] for t in (x, decay, b, c)), initial=state)
    assert (rest - whole[:, :, 33:]).abs().max() <= 1e-4 and (end - last).abs().max() <= 1e-4
    for t in range(33, 70):
        state = step(state, x[:, :, t], decay[:, :, t], b[:, :, t])
        y = torch.einsum("bhn,bhnp->bhp", c[:, :, t], state)
        assert (y - whole[:, :, t]).abs().max() <= 1e-4


@pytest.mark.parametrize("window", [1, 5, 40, 200])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one", "packed"])
def test_blocks_are_the_masked_window(window: int, documents: torch.Tensor | None) -> None:
    q, k, v = (torch.randn(2, 3, 100, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    found, wanted = sliding_window_attention(q, k, v, window, documents), sliding_window_attention_reference(q, k, v, window, documents)
    assert (found - wanted).abs().max() <= 1e-12


def small(seed: int = 0, **keys: Any) -> Model:
    return treadle.build("ssm", seed=seed, **{"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 2, **keys}).eval()


@pytest.mark.parametrize("keys", [{"local_window": 4}, {"local_window": 0}, {"num_streams": 1}])
def test_64_greedy_tokens_with_the_state_are_those_of_full_recomputation(keys: dict[str, Any]) -> None:
    model = shaken(small(**keys), 0.1)  # type: ignore[arg-type]
    seen = ids(1, 9)
    step_out = model(Batch.from_ids(seen), state=model.new_state(1, 9))
    for _ in range(64):
        full, cached = logits(model, seen)[:, -1], step_out.logits[:, -1].detach()  # type: ignore[arg-type]
        assert (full - cached).abs().max() <= 1e-4
        token = full.argmax(-1, keepdim=True)
        assert torch.equal(token, cached.argmax(-1, keepdim=True))
        seen = torch.cat([seen, token], 1)
        step_out.state.max_len += 1
        step_out = model(Batch.from_ids(token), state=step_out.state)


def test_the_state_does_not_grow_and_is_small() -> None:
    shape = {"hidden_size": 256, "num_heads": 4, "num_layers": 2, "vocab_size": 61}
    student, teacher = treadle.build("ssm", **shape), treadle.build("shc", **shape)
    plain = treadle.build("transformer", **shape)
    assert student.state_bytes(1, 64) == student.state_bytes(1, 4096) == student.new_state(1, 4096).nbytes
    assert teacher.state_bytes(1, 1024) / student.state_bytes(1, 1024) >= 4.4
    assert teacher.state_bytes(1, 1024) == plain.state_bytes(1, 1024)  # streams cost nothing while decoding
    latent = treadle.build("shc", latent_size=int(0.6 * 256), **shape)
    assert teacher.state_bytes(1, 1024) / latent.state_bytes(1, 1024) >= 3.3


def test_bad_shapes_say_what_to_type() -> None:
    with pytest.raises(ConfigError, match="--normalizer false"):
        small(feature_map="none")
    with pytest.raises(ConfigError, match="latent_size"):
        small(latent_size=8)
