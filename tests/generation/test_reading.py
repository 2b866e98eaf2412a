"""Weights in fewer bits: every way to decode gives what the modules give, rows alone and together to the last bit."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from functools import partial
from typing import Any

import pytest
import torch

from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.generation.decoding import Decoding
from treadle.generation.dense import FEW, DenseDecoding
from treadle.generation.engine import Engine, Request
from treadle.generation.marks import checksum
from treadle.generation.reading import Reading, in_format, quantized, reading
from treadle.generation.sampling import Sampling
from treadle.layers import quantized_linear
from treadle.layers.quantized_linear import MANY_ROWS, QuantizedLinear, with_quantized
from treadle.models.adapters import adapters_off, add_adapters
from treadle.models.base import build
from treadle.models.settings import AdapterSettings
from treadle.ops import packed_linear
from treadle.ops.packed_linear import FORMATS, multiplies_pairs, native

needs_compiler = pytest.mark.skipif(native() is None, reason="no compiled step here")
SHAPE: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "initializer_range": 0.2}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped queries": {"num_kv_heads": 2},
    "normalised queries": {"qk_norm": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "half rotary": {"head_dim": 32, "partial_rotary_factor": 0.5},
    "shifted embeddings": {"token_shift": True},
    "untied, scaled": {"tie_embeddings": False, "query_pre_attn_scalar": 40.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"style": "gpt2", "max_position_embeddings": 256},
    "windows": {"sliding_window": 8, "layer_types": ["sliding_attention", "attention"]},
    "capped": {"final_logit_softcapping": 5.0},
    "post norms": {"post_norms": True},
    "no norm before": {"pre_norm": False, "post_norms": True},
    "geglu": {"gated_activation": "gelu_tanh"},
    "steered": {"dynamics": "full"},
    "scaled embedding": {"embedding_multiplier": 3.0},
    "recurrent": {"layer_types": ["ssd", "attention"]},
}


def random_model(seed: int = 3, **keys: Any) -> Any:
    model = build("transformer", seed=seed, **{**SHAPE, **keys}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # gains and biases that matter
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        if model.token_shift is not None:
            model.token_shift.gate.weight.normal_(generator=generator)
    return model


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 96, (length,), generator=generator).tolist() for length in lengths]


@needs_compiler
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_step_is_the_modules(kind: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With inputs in fp32: where they are rounded, last bits of a sum become other numbers to be rounded."""
    monkeypatch.setattr(packed_linear, "multiplies_pairs", lambda: False)
    model = random_model(**KINDS[kind])
    ready = reading(model, weights)
    assert ready.form is not None
    ids = torch.tensor(prompts(9, 9))
    expected = Decoding(with_quantized(model, quantized(model, weights)), 2, 20)
    found = ready.start(2, 20)
    with torch.no_grad():
        first, second = expected.prompt(Batch.from_ids(ids)), found.prompt(Batch.from_ids(ids))
        for _ in range(3):
            torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-4 * float(first.abs().max()))
            new = first.argmax(-1)
            first, second = expected.step(new), found.step(new)


@needs_compiler
@pytest.mark.skipif(not multiplies_pairs(), reason="inputs are not rounded on this processor")
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_rounded_inputs_change_little(weights: str) -> None:
    model = random_model()
    rounded = reading(model, weights)
    assert rounded.form is not None and rounded.form.rounds and not reading(model).form.rounds
    exact = Decoding(with_quantized(model, quantized(model, weights), packed=False), 1, 20)
    ids = torch.tensor(prompts(12))
    with torch.no_grad():
        first, second = exact.prompt(Batch.from_ids(ids)), rounded.start(1, 20).prompt(Batch.from_ids(ids))
    difference = float((first - second).abs().max() / first.abs().max())
    assert 0 < difference < 0.02


@needs_compiler
@pytest.mark.parametrize("kind", OTHERS)
def test_what_the_compiled_step_does_not_compute_takes_the_modules(kind: str) -> None:
    model = random_model(**OTHERS[kind])
    assert reading(model, "int8").form is None
    out = model.generate(prompts(6), 5, temperature=0, weights="int8")
    copy = with_quantized(model, quantized(model, "int8"))
    assert torch.equal(out, copy.generate(prompts(6), 5, temperature=0))


@needs_compiler
def test_a_kind_unknown_here_is_found_out_by_trying() -> None:
    """A block that computes something else with the same modules."""
    model = random_model()
    model.layers[1].mlp.forward = lambda x: 1.5 * type(model.layers[1].mlp).forward(model.layers[1].mlp, x)
    assert reading(model).form is None and reading(model, "int8").form is None


@needs_compiler
@pytest.mark.parametrize("weights", FORMATS)
def test_rows_of_different_lengths_go_on_as_they_would_alone(weights: str) -> None:
    """Among them one that is long enough for products of many rows, and one of a single token."""
    model, rows = random_model(num_kv_heads=2), prompts(5, FEW + 9, 1, 17)
    together = model.generate(rows, 12, temperature=0, weights=weights, eos_id=7)
    for number, row in enumerate(rows):
        alone = model.generate(row, 12, temperature=0, weights=weights, eos_id=7)
        assert together[number, -12:].tolist()[: alone.shape[1] - len(row)] == alone[0, len(row) :].tolist()


@needs_compiler
def test_a_long_prompt_in_chunks_is_the_same_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treadle.generation.dense.CHUNK", 150)
    monkeypatch.setattr("treadle.generation.dense.STEP", 150)
    model = random_model(num_kv_heads=2, qk_norm=True)
    ids = torch.tensor(prompts(400))
    with torch.no_grad():
        expected = model(Batch.from_ids(ids)).logits[:, -1]
        found = reading(model).start(1, 401)
        assert isinstance(found, DenseDecoding)
        torch.testing.assert_close(found.prompt(Batch.from_ids(ids)), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        after = model(Batch.from_ids(torch.cat([ids, torch.tensor([[5]])], 1))).logits[:, -1]
        torch.testing.assert_close(found.step(torch.tensor([5])), after, rtol=1e-4, atol=1e-4 * float(after.abs().max()))


@needs_compiler
def test_going_back() -> None:
    """After some of several tokens are kept, the rest was never there: to the last bit where the step is compiled."""
    model = random_model()
    for ready in (reading(model), Reading(model, "fp32", {}), Reading(random_model(layer_types=["ssd", "attention"]), "fp32", {})):
        with torch.no_grad():
            found, straight = ready.start(1, 20), ready.start(1, 20)
            for decoding in (found, straight):
                decoding.prompt(Batch.from_ids(torch.tensor(prompts(6))))
            found.begin()
            found.several(torch.tensor([1, 2, 3, 4]))
            found.several(torch.tensor([5]))
            found.keep(2)
            for token in (1, 2):
                straight.step(torch.tensor([token]))
            bound = 0.0 if ready.form is not None else 1e-5
            torch.testing.assert_close(found.step(torch.tensor([9])), straight.step(torch.tensor([9])), rtol=bound, atol=bound)


@needs_compiler
def test_it_is_kept_until_the_weights_change() -> None:
    model = random_model()
    first = reading(model, "int8")
    assert first.form is not None and reading(model, "int8").form is first.form and reading(model, "int4").form is not first.form
    model.head.weight.data.add_(1.0)  # leaves no version behind
    assert reading(model, "int8").form is not first.form
    model.train()
    assert reading(model, "int8").form is not reading(model, "int8").form


def greedy(model: Any, prompt: list[int], count: int = 8) -> list[int]:
    """By whole forward passes."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(Batch.from_ids(ids)).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


def written(model: Any, weights: str | None = None, count: int = 8) -> list[int]:
    return model.generate(prompts(9)[0], count, temperature=0, weights=weights)[0, 9:].tolist()


@needs_compiler
def test_what_is_set_after_the_first_text_is_heeded() -> None:
    model, heard = random_model(), []
    first = written(model)

    def tripled(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        return 3 * out

    model.layers[0].attention.query_factor = 3.0
    assert written(model) == greedy(model, prompts(9)[0]) != first
    model.layers[0].attention.query_factor = None
    hook = model.layers[0].mlp.register_forward_hook(tripled)
    assert written(model) == greedy(model, prompts(9)[0]) != first
    hook.remove()
    model.layers[1].attention.register_forward_pre_hook(lambda *_: heard.append(1))  # who only listens hears of each token
    assert written(model) == first and len(heard) >= 8


@pytest.mark.parametrize("weights", ["fp32", "int8", "bf16"])
def test_adapters_are_switched_off_and_on_between_texts(weights: str) -> None:
    model = random_model()
    base = written(model, weights)
    add_adapters(model, AdapterSettings(lora_rank=4))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.5, generator=torch.Generator().manual_seed(5))
    bare = written_off(model, weights)
    adapted = written(model, weights)
    assert adapted == greedy(in_format(model, weights), prompts(9)[0]) != bare
    assert (written_off(model, weights), written(model, weights)) == (bare, adapted)
    if weights == "fp32":  # of the others the head alone is in fewer bits once there are adapters
        assert bare == base


def written_off(model: Any, weights: str) -> list[int]:
    with adapters_off(model):
        return written(model, weights)


@needs_compiler
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_every_number_that_is_written_without_a_trace_is_seen(weights: str) -> None:
    model = random_model(vocab_size=1000)
    reading(model, weights)
    with torch.no_grad():
        for place in (0, 1, 777 * 64 + 3, 1000 * 64 - 1):
            before = reading(model, weights).form
            assert reading(model, weights).form is before
            model.embedding.weight.data.view(-1)[place] += 0.5
            assert reading(model, weights).form is not before
        before, row = reading(model, weights).form, model.embedding.weight.data[5].clone()
        model.embedding.weight.data[5], model.embedding.weight.data[900] = model.embedding.weight.data[900], row
        assert reading(model, weights).form is not before
    for p in model.parameters():
        p.requires_grad_(p is model.embedding.weight)
    optimiser, version = torch.optim.AdamW([model.embedding.weight], lr=0.5, weight_decay=0.0, fused=True), model.embedding.weight._version
    before = reading(model, weights).form
    model.embedding.weight[[17, 33, 501]].sum().neg().backward()
    optimiser.step()
    assert model.embedding.weight._version == version and reading(model, weights).form is not before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(), (3,), (7, 5), (3, 4099), (64, 64)])
def test_a_checksum_is_of_every_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    t = torch.arange(1, 1 + math.prod(shape)).remainder(100).to(dtype).reshape(shape)
    known = checksum(t)
    assert checksum(t.clone()) == known
    for place in {0, t.numel() // 2, t.numel() - 1}:
        other = t.clone()
        other.view(-1)[place] += 1
        assert checksum(other) != known


def test_a_model_is_not_kept_alive_by_what_is_known_of_it() -> None:
    def used() -> Any:
        model = random_model()
        model.layers[0].mlp.note = lambda: model
        written(model, "int8")
        return weakref.ref(model)

    gone = used()
    gc.collect()
    assert gone() is None


@needs_compiler
@pytest.mark.parametrize(("arch", "kind", "weights"), [
    ("transformer", KINDS["plain"], "fp32"),
    ("transformer", {**KINDS["biases"], "qk_norm": True, "token_shift": True, "tie_embeddings": False}, "int8"),
    ("transformer", OTHERS["windows"], "int8"), ("transformer", {**OTHERS["gpt2"], "attention_bias": True}, "bf16"), ("hgrn_bit", None, "int8"),
])  # fmt: skip
def test_an_engine_goes_on_with_the_model_that_it_was_given(arch: str, kind: dict[str, Any] | None, weights: str) -> None:
    model = random_model(**kind) if kind is not None else build(arch, seed=3, vocab_size=96, hidden_size=64, num_layers=2).eval()
    prompt, first, second = prompts(9)[0], [], []
    engine = Engine(model, rows=2, max_len=64, weights=weights)
    before, changed, ended = written(model, weights, 16), threading.Event(), threading.Event()

    def on_token(token: Any) -> None:
        first.append(token.id)
        if len(first) == 4:
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(7)) * 0.3)
            changed.set()

    engine.submit(Request(prompt, 16, Sampling(temperature=0.0), on_token=on_token))
    engine.start()
    assert changed.wait(60)
    engine.submit(Request(prompt, 16, Sampling(temperature=0.0), on_token=lambda token: second.append(token.id), on_end=lambda _: ended.set()))
    assert ended.wait(60) and engine.stop(timeout=30)
    assert (first, second) == (before, before) and written(model, weights, 16) != before


@needs_compiler
@pytest.mark.parametrize("kind", ["recurrent", "windows", "gpt2"])
def test_products_in_bf16_depend_on_a_prompts_own_length(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine multiplies bf16: many short prompts, and among longer ones."""
    monkeypatch.setattr(quantized_linear, "multiplies_bf16", lambda: True)
    rounded: list[int] = []
    in_bf16 = QuantizedLinear._in_bf16
    monkeypatch.setattr(QuantizedLinear, "_in_bf16", lambda self, flat: rounded.append(flat.shape[0]) or in_bf16(self, flat))
    model, count = random_model(**OTHERS[kind]), 6
    rows = prompts(5, 9, 20, 31, 12, 8, MANY_ROWS - 1, MANY_ROWS, MANY_ROWS + 30)
    alone = []
    for row in rows:
        rounded.clear()
        alone.append(model.generate(row, count, temperature=0, weights="int8")[0, len(row) :].tolist())
        assert bool(rounded) == (len(row) >= MANY_ROWS) and set(rounded) <= {1, len(row)}  # 1: the head
    assert model.generate(rows, count, temperature=0, weights="int8")[:, -count:].tolist() == alone
    rounded.clear()
    assert model.generate(rows[:7], count, temperature=0, weights="int8")[:, -count:].tolist() == alone[:7] and not rounded
    engine, found, ended = Engine(model, rows=len(rows), max_len=128, weights="int8"), [[] for _ in rows], threading.Semaphore(0)
    for row, own in zip(rows, found):
        listener = partial(lambda own, token: own.append(token.id), own)
        engine.submit(Request(row, count, Sampling(temperature=0.0), on_token=listener, on_end=lambda _: ended.release()))
    engine.start()
    assert all(ended.acquire(timeout=60) for _ in rows) and engine.stop(timeout=30)
    assert found == alone


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ConfigError, match="int8"):
        random_model().generate([1], 2, weights="int3")
