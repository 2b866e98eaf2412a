"""Every token mixer against its equations written as a loop over positions, and what it promises about memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import treadle
from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.layers.context import Context
from treadle.layers.rope import rotation
from treadle.layers.token_mixers import TOKEN_MIXERS, TokenMixer
from treadle.models.transformer import TransformerConfig
from treadle.ops.block_sparse_attention import block_sparse_attention_reference

WIDTH, HEADS, LENGTH = 24, 3, 90  # more than one chunk of 64
KEYS: dict[str, Any] = {"hidden_size": WIDTH, "num_heads": HEADS, "head_dim": 8, "state_size": 6, "low_rank_size": 4, "attention_block_size": 8,
                        "global_tokens": 3, "previous_blocks": 1}  # fmt: skip
DOCUMENTS = torch.tensor([[0] * 40 + [1] * 50])


def mixer(name: str, **more: Any) -> TokenMixer:
    config = TransformerConfig.with_preset(None, **{**KEYS, **more})
    made = TOKEN_MIXERS.get(name).from_config(config, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, p in made.named_parameters():
            start = made.initial(parameter_name, p)
            start = start if isinstance(start, Tensor) else torch.randn(p.shape, generator=generator) * 0.3 + (p.dim() == 1 and "bias" not in parameter_name)
            p.copy_(start)
    return made


# Each loop below takes the mixer and the inputs of one document, x [T, D], and (cos, sin) [T, E / 2]; it returns [T, D].


def heads(t: Tensor, count: int = HEADS) -> Tensor:
    return t.unflatten(-1, (count, -1))


def turned(t: Tensor, rotary: tuple[Tensor, Tensor], at: int) -> Tensor:
    cos, sin = (r[at] for r in rotary)
    a, b = t.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rms(t: Tensor, eps: float) -> Tensor:
    return t / (t.square().mean(-1, keepdim=True) + eps).sqrt()


def centred(t: Tensor, eps: float) -> Tensor:
    return (t - t.mean(-1, keepdim=True)) / (t.var(-1, keepdim=True, unbiased=False) + eps).sqrt()


def convolved(weight: Tensor, x: Tensor) -> Tensor:
    rows = []
    for t in range(len(x)):
        rows.append(sum(weight[:, k] * x[t - k] for k in range(weight.shape[1]) if t - k >= 0))
    return torch.stack(rows)  # type: ignore[arg-type]


def linear_attention(m: Any, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    out = []
    q, k, v = (heads(layer(x)) for layer in (m.query, m.key, m.value))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    for t in range(len(x)):
        above: Any = 0
        below: Any = 0
        for s in range(t + 1):
            above = above + (turned(q[t], rotary, t) * turned(k[s], rotary, s)).sum(-1, keepdim=True) * v[s]
            below = below + (q[t] * k[s]).sum(-1, keepdim=True)
        out.append((above / (below + 1e-6)).flatten())
    return m.out(torch.stack(out))


def retnet(m: Any, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    q, k, v = (heads(layer(x)) for layer in (m.query, m.key, m.value))
    gamma = torch.tensor([1 - 2.0 ** (-5 - 4 * h / (HEADS - 1)) for h in range(HEADS)], dtype=x.dtype)
    state, out = torch.zeros(HEADS, q.shape[-1], v.shape[-1], dtype=x.dtype), []
    for t in range(len(x)):
        state = gamma[:, None, None] * state + turned(k[t], rotary, t)[..., None] * v[t][:, None] / math.sqrt(q.shape[-1])
        out.append(torch.einsum("hn,hnp->hp", turned(q[t], rotary, t), state))
    y = centred(torch.stack(out), m.norm.eps).flatten(1) * m.norm.weight + m.norm.bias
    return m.out(y * F.silu(m.gate(x)))


def ssd(m: Any, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    inputs, b, c = F.silu(convolved(m.convolution.weight, m.input(x))).split([m.inner, m.state_size, m.state_size], -1)
    inputs, dt, out = heads(inputs), F.softplus(m.step(x)), []
    state = torch.zeros(HEADS, m.state_size, inputs.shape[-1], dtype=x.dtype)
    for t in range(len(x)):
        decay = torch.exp(-torch.exp(m.rate) * dt[t])
        state = decay[:, None, None] * state + b[t][None, :, None] * (dt[t][:, None] * inputs[t])[:, None]
        out.append((torch.einsum("n,hnp->hp", c[t], state) + m.skip[:, None] * inputs[t]).flatten())
    return m.out(rms(torch.stack(out) * F.silu(m.gate(x)), m.norm.eps) * m.norm.weight)


def hgrn(m: Any, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    weights = m.convolution.weight.chunk(2)
    f, i = torch.sigmoid(convolved(weights[0], m.forget(x))), convolved(weights[1], m.input(x))
    state: Any = 0
    out = []
    for t in range(len(x)):
        state = f[t] * state + F.silu(i[t]) * (1 - f[t])
        out.append(state)
    y = rms(heads(torch.stack(out)), m.eps).flatten(1) * m.norm
    return m.out(y * F.silu(m.output_gate(x)))


def rwkv(m: Any, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    change = torch.cat([torch.zeros_like(x[:1]), x[:-1]]) - x
    low = torch.tanh(m.mix_down(x + change * m.mix_first)).chunk(5, -1)
    w, k, v, r, g = (x + change * (own + part @ up) for own, part, up in zip(m.mix.chunk(5), low, m.mix_up))
    decay = torch.exp(-torch.exp(heads(torch.tanh(w @ m.decay_down.weight.T) @ m.decay_up.weight.T + m.decay_up.bias)))
    k, v, r = heads(m.key(k)), heads(m.value(v)), heads(m.receptance(r))
    bonus, state, out = heads(m.bonus), torch.zeros(HEADS, k.shape[-1], v.shape[-1], dtype=x.dtype), []
    for t in range(len(x)):
        new = k[t][..., None] * v[t][:, None]
        out.append(torch.einsum("hn,hnp->hp", r[t], state + bonus[..., None] * new))
        state = decay[t][..., None] * state + new
    y = centred(torch.stack(out), m.norm.eps).flatten(1) * m.norm.weight + m.norm.bias
    return m.out(y * F.silu(m.gate(g)))


def gated_deltanet(m: Any, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    mixed = F.silu(convolved(m.convolution.weight, torch.cat([m.query(x), m.key(x), m.value(x)], -1)))
    q, k, v = (heads(t) for t in mixed.split([HEADS * m.head_width, HEADS * m.head_width, HEADS * m.value_width], -1))
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    decay, beta = torch.exp(-torch.exp(m.rate) * F.softplus(m.step(x))), torch.sigmoid(m.beta(x))
    state, out, eye = torch.zeros(HEADS, k.shape[-1], v.shape[-1], dtype=x.dtype), [], torch.eye(k.shape[-1], dtype=x.dtype)
    for t in range(len(x)):
        forget = decay[t][:, None, None] * (eye - beta[t][:, None, None] * k[t][..., None] * k[t][:, None])
        state = forget @ state + beta[t][:, None, None] * k[t][..., None] * v[t][:, None]
        out.append(torch.einsum("hn,hnp->hp", q[t], state))
    return m.out(rms(torch.stack(out), m.norm.eps).flatten(1) * m.norm.weight * F.silu(m.gate(x)))


def block_sparse_attention(m: Any, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    q, k, v = (heads(layer(x)).transpose(0, 1) for layer in (m.query, m.key, m.value))
    q, k = (torch.stack([turned(t[:, at], rotary, at) for at in range(len(x))], 1) for t in (q, k))
    y = block_sparse_attention_reference(q[None], k[None], v[None], m.size, m.previous, m.global_tokens)[0]
    return m.out(y.transpose(0, 1).flatten(1))


LOOPS: dict[str, Callable[..., Tensor]] = {
    "block_sparse_attention": block_sparse_attention, "linear_attention": linear_attention, "ssd": ssd, "hgrn": hgrn,
    "retnet": retnet, "rwkv": rwkv, "gated_deltanet": gated_deltanet,
}  # fmt: skip


def test_every_mixer_has_a_loop() -> None:
    assert {*LOOPS, "full_attention"} <= set(TOKEN_MIXERS.names())


# hgrn's layer computes in fp32 throughout, and is held to 2e-6 there; its recurrence in fp64 is in tests/ops.
CASES = [(name, torch.float32, 2e-6 if name == "hgrn" else 1e-5) for name in LOOPS]
CASES += [(name, torch.float64, 1e-9) for name in LOOPS if name != "hgrn"]


@pytest.mark.parametrize("name, dtype, bound", CASES, ids=lambda value: str(value))
def test_a_mixer_is_its_equations(name: str, dtype: torch.dtype, bound: float) -> None:
    """Two packed documents: values, the gradient of the input and of every parameter."""
    made = mixer(name).to(dtype)
    x = torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    positions = torch.cat([torch.arange(40), torch.arange(50)])[None]
    rotary = rotation(positions, 8, dtype=dtype)
    found = []
    for fast in (True, False):
        given = x.clone().requires_grad_()
        if fast:
            y = made(given, Context(doc_ids=DOCUMENTS, rotary=rotary))
        else:
            of_row = [r[0, 0] for r in rotary]
            y = torch.cat([LOOPS[name](made, given[0, part], [r[part] for r in of_row]) for part in (slice(0, 40), slice(40, 90))])[None]
        (y * torch.arange(y.numel(), dtype=dtype).view(y.shape).cos()).sum().backward()
        found.append([y.detach(), given.grad, *(p.grad for p in made.parameters())])
        made.zero_grad()
    for number, (a, b) in enumerate(zip(*found)):
        assert (a - b).abs().max() <= bound * max(1.0, float(b.abs().max())), number


def saved_bytes(made: TokenMixer, length: int) -> int:
    total = 0
    seen: set[int] = set()

    def count(t: Tensor) -> Tensor:
        nonlocal total
        if t.untyped_storage().data_ptr() not in seen:  # several names of one piece of memory
            seen.add(t.untyped_storage().data_ptr())
            total += t.untyped_storage().nbytes()
        return t

    x = torch.randn(1, length, WIDTH, requires_grad=True)
    rotary = rotation(torch.arange(length)[None], 8)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        made(x, Context(rotary=rotary))
    return total


@pytest.mark.parametrize("name", LOOPS)
def test_saved_memory_grows_with_the_length(name: str) -> None:
    made = mixer(name)
    assert saved_bytes(made, 2048) <= 2.2 * saved_bytes(made, 1024)
    assert saved_bytes(made, 1024) > 1024 * WIDTH * 4


@pytest.mark.parametrize("name", LOOPS)
def test_the_decoding_state_does_not_grow(name: str) -> None:
    model = treadle.build("transformer", num_layers=1, layer_types=[name], **KEYS)
    assert model.state_bytes(2, 10) == model.state_bytes(2, 100_000)


@pytest.mark.parametrize("name", LOOPS)
def test_many_documents_over_several_chunks_stay_apart(name: str) -> None:
    """The contract of packed rows has 24 positions; here chunks, blocks and documents end at different places."""
    model = treadle.build("transformer", num_layers=2, vocab_size=61, layer_types=[name], **KEYS).eval()
    ids = torch.randint(0, 61, (1, 200), generator=torch.Generator().manual_seed(0))
    ends = [0, 30, 31, 64, 130, 190]
    doc_ids = torch.full((1, 200), -1)
    for number, (start, stop) in enumerate(itertools.pairwise(ends)):
        doc_ids[0, start:stop] = number
    changed = ids.clone()
    changed[0, 64:130] = (changed[0, 64:130] + 3) % 61
    with torch.no_grad():
        packed, other = (model(Batch.from_ids(t, doc_ids=doc_ids)).logits[0] for t in (ids, changed))
        assert torch.equal(packed[:64], other[:64]) and torch.equal(packed[130:190], other[130:190])
        for start, stop in itertools.pairwise(ends):
            alone = model(Batch.from_ids(ids[:, start:stop])).logits[0]
            torch.testing.assert_close(packed[start:stop], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", LOOPS)
def test_decoding_goes_on_after_long_prompts_and_padding(name: str) -> None:
    """Prompts of 150 and 97 positions, padded on the left and with holes, then pieces and single positions."""
    model = treadle.build("transformer", num_layers=2, vocab_size=61, layer_types=[name], **KEYS).eval()
    ids = torch.randint(0, 61, (2, 150), generator=torch.Generator().manual_seed(0))
    doc_ids = torch.zeros(2, 150, dtype=torch.int64)
    doc_ids[1, :40] = -1
    doc_ids[1, 70:83] = -1
    more = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        state = model(Batch.from_ids(ids, doc_ids=doc_ids), state=model.new_state(2, 170)).state
        parts = [model(Batch.from_ids(more[:, at]), state=state).logits for at in (slice(0, 1), slice(1, 12), slice(12, 13), slice(13, 20))]
        for row in range(2):
            whole = torch.cat([ids[row][doc_ids[row] >= 0], more[row]])
            full = model(Batch.from_ids(whole)).logits[0, -20:]
            torch.testing.assert_close(torch.cat(parts, 1)[row], full, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", LOOPS)
def test_gates_at_their_limits_stay_finite(name: str) -> None:
    """Inputs that drive every gate to about +-30 and more: outputs and gradients are numbers, in fp32 and in bf16."""
    made = mixer(name)
    x = torch.randn(2, 300, WIDTH, generator=torch.Generator().manual_seed(0)) * 60
    for low in (False, True):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y = made(given, Context(rotary=rotation(torch.arange(300)[None], 8)))
        y.float().square().mean().backward()
        assert bool(y.isfinite().all()) and given.grad is not None and bool(given.grad.isfinite().all())
        assert all(bool(p.grad.isfinite().all()) for p in made.parameters() if p.grad is not None)
        made.zero_grad()


@pytest.mark.parametrize("gate", [-100.0, -30.0, 30.0, 100.0])
@pytest.mark.parametrize("name, bias", [("ssd", "step"), ("gated_deltanet", "step"), ("rwkv", "decay_up")])
def test_decays_at_their_limits(name: str, bias: str, gate: float) -> None:
    """A bias that shuts or opens every decay, as far as exp(100), which fp32 does not hold: the equations all the same."""
    made = mixer(name)
    with torch.no_grad():
        getattr(made, bias).bias.fill_(gate)
    x = torch.randn(1, 70, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rotary = rotation(torch.arange(70)[None], 8)
    y = made(x, Context(rotary=rotary))
    y.square().sum().backward()
    assert x.grad is not None and all(bool(t.isfinite().all()) for t in (x.grad, *(p.grad for p in made.parameters())))
    torch.testing.assert_close(y[0], LOOPS[name](made, x[0], (rotary[0][0, 0], rotary[1][0, 0])), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", LOOPS)
def test_decoding_under_autocast(name: str) -> None:
    """As the trainer's samples are made: states in fp32, products in bf16, near the full forward pass."""
    model = treadle.build("transformer", num_layers=1, vocab_size=61, layer_types=[name], **KEYS).eval()
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    doc_ids = torch.zeros(2, 12, dtype=torch.int64)
    doc_ids[1, :5] = -1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        state = model(Batch.from_ids(ids, doc_ids=doc_ids), state=model.new_state(2, 20)).state
        step = model(Batch.from_ids(ids[:, :1]), state=state).logits
        whole = model(Batch.from_ids(torch.cat([ids[1, 5:], ids[1, :1]]))).logits
    torch.testing.assert_close(step[1, 0].float(), whole[0, -1].float(), atol=2e-2, rtol=2e-2)


def test_other_names_for_mixers_are_understood() -> None:
    for word, name in (("mamba2", "ssd"), ("Mamba-2", "ssd"), ("retention", "retnet"), ("rwkv6", "rwkv"), ("deltanet", "gated_deltanet"),
                       ("gdn", "gated_deltanet"), ("gated_delta_net", "gated_deltanet"), ("linear", "linear_attention"),
                       ("sparse", "block_sparse_attention"), ("block-sparse", "block_sparse_attention"), ("attention", "full_attention")):  # fmt: skip
        assert TOKEN_MIXERS.canonical(word) == name


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"layer_types": ["sdd"]}, "did you mean 'ssd'"),
        ({"layer_types": ["ssd"], "hidden_size": 20, "num_heads": 3, "head_dim": 8}, "does not divide by num_heads = 3; choose"),
        ({"layer_types": ["ssd"], "convolution_size": 1}, "use 0 for none"),
        ({"layer_types": ["ssd", "ssd", "ssd"], "num_layers": 2}, "names 3 layers"),
    ],
)
def test_errors_say_what_to_choose(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TransformerConfig.with_preset(None, **keys)


@pytest.mark.parametrize("name", ["ssd", "hgrn", "gated_deltanet"])
def test_mixers_without_a_short_convolution(name: str) -> None:
    model = treadle.build("transformer", num_layers=1, vocab_size=61, layer_types=[name], convolution_size=0, **KEYS).eval()
    ids = torch.randint(0, 61, (1, 9))
    with torch.no_grad():
        state, full = model.new_state(1, 9), model(Batch.from_ids(ids)).logits
        parts = [model(Batch.from_ids(ids[:, at : at + 3]), state=state).logits for at in (0, 3, 6)]
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-5, rtol=1e-4)


def test_what_the_optimiser_is_told() -> None:
    """Short convolutions are no matrices to Muon, and neither they nor low-rank mixes decay."""
    rules = treadle.build("transformer", num_layers=2, layer_types=["ssd", "rwkv"], **KEYS).parameter_rules()
    convolution, mix = rules["layers.0.attention.convolution.weight"], rules["layers.1.attention.mix_up"]
    assert convolution.weight_decay is False and not convolution.matrix and mix.weight_decay is False
