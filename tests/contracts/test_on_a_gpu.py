"""A GPU computes what the CPU does, which the other contracts hold to its definitions. Skipped where there is none."""

from __future__ import annotations

import copy
import threading
import warnings
from pathlib import Path

import pytest
import torch

import treadle
from tests.conftest import make_text
from treadle.data.base import Dataset
from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.generation import steps
from treadle.generation.engine import Engine, Request
from treadle.generation.sampling import Sampling
from treadle.layers.lora import is_adapter
from treadle.models.adapters import add_adapters
from treadle.models.base import Model
from treadle.models.settings import AdapterSettings
from treadle.objectives.next_token import NextToken
from treadle.ops import document_attention, ternary
from treadle.ops.attention import causal_attention
from treadle.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from treadle.ops.fp8 import fp8_linear
from treadle.ops.precision import FP8_FROM
from treadle.ops.scan import scan, scan_reference
from treadle.training.resolve import compile_blocks

from .conftest import make, needs, random_ids

DEVICE = "cuda"
if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)


def pair(case: tuple[str, int]) -> tuple[Model, Model]:
    here, there = make(*case), make(*case)
    return here, there.to(DEVICE)


def packed() -> Batch:
    doc_ids = torch.tensor([[0] * 9 + [1] * 10 + [2] * 5, [0] * 20 + [-1] * 4])
    return Batch.for_training(random_ids(2, 24), doc_ids=doc_ids)


def test_logits_on_packed_rows(case: tuple[str, int]) -> None:
    here, there = (model.eval() for model in pair(case))
    batch = packed()
    with torch.no_grad():
        want, found = here(batch).logits, there(batch.to(DEVICE)).logits
    real = batch.token_mask
    torch.testing.assert_close(found.cpu()[real], want[real], atol=1e-4, rtol=1e-3)


def test_gradients_on_packed_rows(case: tuple[str, int]) -> None:
    found = []
    for model in pair(case):
        NextToken()(model, packed().to(model.device)).losses["next_token"].total.backward()
        found.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    # In training the norms are fp32, and a last bit may move a rounding to int8 by one.
    bound = 0.05 if model.capabilities.rounds else 1e-3
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() <= bound * gradient.norm() + 1e-5, name


def test_decoding_is_the_full_forward(case: tuple[str, int]) -> None:
    model = make(*case).to(DEVICE).eval()
    needs(model, "decodes")
    ids = random_ids(3, 20).to(DEVICE)
    with torch.no_grad():
        whole, state, parts = model(Batch.from_ids(ids)).logits, model.new_state(3, 20), []
        for at in (slice(0, 7), *(slice(t, t + 1) for t in range(7, 20))):
            out = model(Batch.from_ids(ids[:, at]), state=state)
            parts.append(out.logits)
            state = out.state
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_goes_on_and_moves_to_the_cpu(case: tuple[str, int], precision: str, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text(make_text(60))
    data = Dataset.load(str(text), "byte", 48)

    def trainer(device: str, steps: int, resume: bool) -> treadle.Trainer:
        config = treadle.TrainConfig(output_dir=str(tmp_path / "run"), max_steps=steps, batch_size=2, report_to=["jsonl"], device=device,
                                     precision=precision if device == DEVICE else "fp32", learning_rate=1e-3)  # fmt: skip
        return treadle.Trainer(make(*case, vocab_size=256), data, config=config, resume=resume)

    first = trainer(DEVICE, 4, False)
    first.train()
    assert next(first.model.parameters()).device.type == DEVICE
    for device, last in ((DEVICE, 8), ("cpu", 10)):
        later = trainer(device, last, True)
        later.train()
        assert later.state.step == last
        assert all(bool(p.isfinite().all()) for p in later.model.parameters())


def test_batches_are_pinned_whatever_shares_their_memory() -> None:
    """position_ids of rows without documents are one row expanded, which page-locked memory cannot be."""
    batch = Batch.from_ids(random_ids(3, 8), extras={"one": torch.zeros(1, 4).expand(3, 4)})
    pinned = batch.pin()
    assert pinned.position_ids is not None and pinned.position_ids.is_pinned() and pinned.extras["one"].is_pinned()
    assert torch.equal(pinned.position_ids, batch.position_ids)


@pytest.mark.parametrize("backend", ["loop", "triton"])
@pytest.mark.parametrize("started", [True, False])
def test_the_recurrence(backend: str, started: bool) -> None:
    torch.manual_seed(0)
    gate, value, slope = torch.rand(2, 70, 40), torch.randn(2, 70, 40), torch.randn(2, 70, 40)
    gate[:, 30] = 0.0  # a document begins
    found = []
    for device, function in (("cpu", scan_reference), (DEVICE, lambda *given: scan(*given, backend=backend))):  # type: ignore[arg-type]
        given = [t.to(device).requires_grad_() for t in (gate, value, *((torch.ones(2, 40),) if started else ()))]
        out = function(*given)
        gradients = torch.autograd.grad(out, given, slope.to(device))
        inside = gradients[0].cpu().clone()
        inside[:, 30] = 0.0  # nobody asks for the gradient of a gate that is fixed
        found.append([out.detach().cpu(), inside, *(g.cpu() for g in gradients[1:])])
    for want, got in zip(*found):
        assert (got - want).abs().max() <= 2e-6 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize("width, out", [(61, 7), (64, 24), (2048, 136)])
def test_ternary_products_are_exact(rows: int, width: int, out: int) -> None:
    torch.manual_seed(rows)
    q = torch.randint(-128, 128, (rows, width), dtype=torch.int8)
    matrix = torch.randint(-1, 2, (out, width), dtype=torch.int8)
    found = ternary.integer_product(q.to(DEVICE), matrix.to(DEVICE))
    assert torch.equal(found.cpu(), (q.long() @ matrix.long().t()).float())
    x = torch.randn(rows, width)
    layers = [ternary.PackedLayer(matrix.to(d), torch.tensor(0.5, device=d), torch.ones(width, device=d), 1e-8) for d in ("cpu", DEVICE)]
    torch.testing.assert_close(layers[1](x.to(DEVICE)).cpu(), layers[0](x), atol=0, rtol=0)


@pytest.mark.timeout(1200)  # Triton tunes wkv's kernels for more than five minutes, the first time
@pytest.mark.parametrize("kind", ["ssd", "delta_rule", "wkv"])
def test_kernels_of_flash_linear_attention(kind: str) -> None:
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    from treadle.ops.flash_linear_attention import agrees

    agrees.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = agrees(kind, torch.bfloat16, "cuda:0")
    why = " ".join(str(warning.message) for warning in said)
    if not found and "differs from the loop" not in why:  # the package itself refuses some GPUs with some versions of Triton
        pytest.skip(why or "there is no such kernel in this version")
    assert found, why


@pytest.mark.parametrize("window", [None, 9])
def test_attention_of_packed_rows_by_the_kernel_for_documents(window: int | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert document_attention.agrees("cuda:0")
    torch.manual_seed(0)
    runs = ((30, 1, 60, -9), (100,), (1,) * 100)
    documents = torch.tensor([[number if run > 0 else -1 for number, run in enumerate(row) for _ in range(abs(run))] for row in runs])
    q, k, v = (torch.randn(3, heads, 100, 64).bfloat16() for heads in (4, 2, 2))
    found = []
    for device in ("cpu", DEVICE):
        given = [t.to(device, torch.float32 if device == "cpu" else torch.bfloat16).requires_grad_() for t in (q, k, v)]
        ends = document_attention.document_ends(runs, torch.device("cuda:0")) if device == DEVICE else None
        y = causal_attention(given[0], given[1], given[2], doc_ids=documents.to(device), segments=runs, window=window, ends=ends)
        real = (documents >= 0)[:, None, :, None].to(device)
        found.append([(y * real).float().cpu(), *(g.float().cpu() for g in torch.autograd.grad((y * real).float().square().sum(), given))])
    for want, got in zip(*found):
        assert (got - want).norm() <= 1e-2 * want.norm()


def test_compiled_blocks_take_other_documents_without_another_compilation() -> None:
    from torch._dynamo.utils import counters

    model = make("transformer", 0, hidden_size=64, num_heads=4, num_kv_heads=2).to(DEVICE)
    compile_blocks(model)
    rows = [[40, 24], [10, 20, 34], [5, 5, 5, 49], [64], [1, 63], [20] * 3 + [4]]
    counters.clear()
    for step, row in enumerate(rows * 2):
        documents = torch.tensor([[number for number, run in enumerate(row) for _ in range(run)]] * 2)
        batch = Batch.for_training(random_ids(2, 64, seed=step), doc_ids=documents).to(DEVICE)
        with torch.autocast("cuda", torch.bfloat16):
            NextToken()(model, batch).losses["next_token"].total.backward()
    assert counters["stats"]["unique_graphs"] <= 3, dict(counters["stats"])


@pytest.mark.parametrize("compiled", [False, True])
def test_products_of_8_bits_are_those_that_a_cpu_computes(compiled: bool) -> None:
    if torch.cuda.get_device_capability() < FP8_FROM:
        pytest.skip("this GPU has no products of 8-bit floats")
    torch.manual_seed(0)
    x, weight, slope = torch.randn(96, 64), torch.randn(128, 64) * 0.1, torch.randn(96, 128) * 1e-3
    way, found = torch.compile(fp8_linear) if compiled else fp8_linear, []
    for device, function in (("cpu", fp8_linear), (DEVICE, way)):
        leaves = [t.to(device, torch.bfloat16).requires_grad_() for t in (x, weight)]
        out = function(*leaves)
        out.backward(slope.to(device, torch.bfloat16))
        found.append([t.detach().float().cpu() for t in (out, *(leaf.grad for leaf in leaves))])
    for want, got in zip(*found):
        assert (got - want).norm() <= 1e-2 * want.norm()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_in_one_kernel(softcap: float | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(300, 64), torch.randn(5003, 64) * 0.3, torch.randint(0, 5003, (300,))
    labels[::7] = -100
    found = []
    for device, way in (("cpu", linear_cross_entropy_reference), (DEVICE, linear_cross_entropy)):
        given = [t.to(device).requires_grad_() for t in (hidden, weight)]
        with torch.autocast("cuda", dtype, enabled=device == DEVICE and dtype != torch.float32):
            total = way(given[0], given[1], labels.to(device), softcap)
        found.append([total.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(total, given))])
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for want, got in zip(*found):
        assert (got - want).norm() <= bound * want.norm()


@pytest.mark.parametrize("weights", [None, "bf16", "int8"])
def test_requests_together_write_what_they_write_alone(case: tuple[str, int], weights: str | None) -> None:
    """Greedy ids in fp32; in bf16 and int8 a product over one row may round as one over four does not, so that only its form is held."""
    model = make(*case).to(DEVICE).eval()
    needs(model, "decodes")
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (3, 9, 1, 14, 6)]
    engine = Engine(model, rows=4, max_len=40, weights=weights)
    written: list[list[int]] = [[] for _ in prompts]
    ended = [threading.Event() for _ in prompts]
    reasons: list[str] = [""] * len(prompts)

    def end(number: int, why: str) -> None:
        reasons[number] = why
        ended[number].set()

    engine.start()
    try:
        for number, prompt in enumerate(prompts):
            engine.submit(Request(prompt, 12, Sampling(temperature=0.0), on_token=lambda t, n=number: written[n].append(t.id),  # type: ignore[misc]
                                  on_end=lambda why, n=number: end(n, why)))  # type: ignore[misc]
        assert all(event.wait(120) for event in ended)
    finally:
        engine.stop()
    assert set(reasons) == {"length"} and {len(ids) for ids in written} == {12}
    if weights is None:
        alone = [model.generate(torch.tensor([p], device=DEVICE), 12, temperature=0.0)[0, len(p) :].tolist() for p in prompts]
        assert written == alone


def test_generation_by_graphs(case: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids that are written kernel by kernel, through caches that grow and a second generation; and afterwards numbers can be drawn."""
    model = make(*case).to(DEVICE).eval()
    needs(model, "decodes")
    monkeypatch.setattr(steps, "SPAN", 16)
    recorded: list[int] = []
    record = steps.record

    def counted(work):  # type: ignore[no-untyped-def]
        recorded.append(1)
        return record(work)

    monkeypatch.setattr(steps, "record", counted)
    prompt = random_ids(3, 9).to(DEVICE)
    by_graphs = [model.generate(prompt, 30, temperature=0.0) for _ in range(2)]
    monkeypatch.setattr("treadle.generation.decoding.steps_of", steps.Steps)
    wanted = model.generate(prompt, 30, temperature=0.0)
    assert all(torch.equal(one, wanted) for one in by_graphs)
    assert len(recorded) == (0 if model.arch == "hnet" else 6)
    torch.randn(3, device=DEVICE)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_adapters_compute_and_learn_as_on_the_cpu(case: tuple[str, int], kind: str) -> None:
    try:
        here = make(*case)
        add_adapters(here, AdapterSettings(lora_rank=4, base_precision=kind))
    except ConfigError as refused:  # ternary layers have nothing to adapt
        pytest.skip(str(refused))
    with torch.no_grad():
        for name, parameter in here.named_parameters():
            if is_adapter(name):
                parameter.normal_(std=0.1)
    there = copy.deepcopy(here).to(DEVICE)
    found = []
    for model in (here, there):
        loss = NextToken()(model, packed().to(model.device)).losses["next_token"].total
        loss.backward()
        found.append((float(loss.detach()), {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4) and found[0][1].keys() == found[1][1].keys()
    assert all(is_adapter(name) for name in found[0][1])
    for name, gradient in found[0][1].items():
        assert (found[1][1][name] - gradient).norm() <= 2e-3 * gradient.norm() + 1e-5, name
