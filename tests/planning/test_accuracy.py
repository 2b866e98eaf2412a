"""The plan's memory against what real steps take, and against a ledger counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.plan import CASES, Case, measured_bytes, predicted_bytes
from treadle.models.catalogue import MODELS
from treadle.objectives.next_token import NextToken
from treadle.planning.ledger import Ledger, Watch
from treadle.planning.memory import Sizes, per_process
from treadle.planning.step_trace import Shape, period_of, trace_step, with_rows

EXACT, QUICK = 0.05, 0.15
NAMED = {case.name: case for case in CASES}
USUAL = ("llama, short rows", "hgrn_bit")


def check(case: Case) -> None:
    real = measured_bytes(case)
    assert real > 100e6, f"{real / 1e6:.0f} MB: too small to tell the estimate from the allocator's noise"
    exact, quick = predicted_bytes(case, True), predicted_bytes(case, False)
    assert exact == pytest.approx(real, rel=EXACT), f"exact is {exact / real - 1:+.1%}"
    assert quick == pytest.approx(real, rel=QUICK), f"quick is {quick / real - 1:+.1%}"


@pytest.mark.parametrize("name", USUAL)
def test_memory_of_a_real_step(name: str) -> None:
    check(NAMED[name])


@pytest.mark.slow  # 15 more models that take 2 steps each, in bf16 without bf16 instructions half a minute a step
@pytest.mark.parametrize("name", [name for name in NAMED if name not in USUAL])
def test_memory_of_every_architecture(name: str) -> None:
    check(NAMED[name])


def test_the_ledger_counts_what_is_alive() -> None:
    """y = relu(W2 relu(W1 x)) of 4 x 8 fp32 numbers: weights, what each operation keeps, and what is gone."""
    ledger = Ledger()
    with FakeTensorMode():
        first, second = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)
        ledger.sort([first.weight, second.weight], "kept")
        assert ledger.alive == {"activations": 0, "gradients": 0, "casts": 0, "kept": 2 * 8 * 16 * 4}
        for weight in (first.weight, second.weight):
            weight.register_post_accumulate_grad_hook(lambda p: ledger.sort([p.grad], "gradients"))  # type: ignore[list-item]
        with Watch(ledger):
            x = torch.randn(4, 8)
            ledger.mark("forward")
            y = second(first(x).relu())
            # x, relu's result (4 x 16, which both the product and relu keep) and y; the product before relu is gone.
            assert ledger.alive["activations"] == 4 * (4 * 8 + 4 * 16 + 4 * 8)
            ledger.mark("backward")
            y.sum().backward()
            del y
        assert ledger.alive["gradients"] == 2 * 8 * 16 * 4
        assert ledger.alive["activations"] == 4 * 4 * 8  # x, which is still held here
    fullest = max(m.activations for m in ledger.moments() if m.part == "forward")
    assert fullest == 4 * (4 * 8 + 2 * 4 * 16)  # x, and relu's argument and result at once


def test_weights_in_sixteen_bits_are_told_apart() -> None:
    """Autocast holds a copy of every weight it has used, but none of a block that recomputes; fsdp holds none of them."""
    whole, again = (trace("transformer", 2, True, checkpointing, "bf16", **SMALL) for checkpointing in (False, True))
    most = [max(m.casts for m in found.moments if m.part == "loss") for found in (whole, again)]
    config = MODELS.get("transformer").Config.with_preset(None, **SMALL)
    with torch.device("meta"):
        sizes = Sizes.of(MODELS.get("transformer")(config))  # type: ignore[call-arg]
    vectors = 2 * 5 * 32  # norms stay fp32
    head = 2 * 64 * 32  # of the loss, in both
    assert most[0] == 2 * (sum(sizes.blocks) - vectors) + head and most[1] == head
    shape = Shape(2, 32, 1, "bf16", False)
    alone, sharded = (per_process(sizes, whole, shape, mode, world, None) for mode, world in (("none", 1), ("fsdp", 2)))
    at_peak = max(m.casts for m in whole.moments if m.part == alone.phase)  # the head's share is there in the loss alone
    assert most[0] - head <= at_peak <= most[0] and alone.casts_gb == pytest.approx(at_peak / 1e9) and sharded.casts_gb == 0.0


def trace(arch: str, rows: int, exact: bool, checkpointing: bool = False, precision: str = "fp32", **keys: object):  # type: ignore[no-untyped-def]
    cls = MODELS.get(arch)
    config = cls.Config.with_preset(None, **keys)
    shape = Shape(rows, 32, 1, precision, checkpointing)
    return trace_step(cls, config, NextToken(), shape, cls.example(config, rows, 32), exact=exact)


def peak(found) -> float:  # type: ignore[no-untyped-def]
    return max(moment.activations + moment.gradients for moment in found.moments)


SMALL = {"hidden_size": 32, "num_layers": 5, "num_heads": 2, "vocab_size": 64}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_quick_is_exact_where_blocks_are_equal(checkpointing: bool) -> None:
    quick, exact = (trace("transformer", 2, how, checkpointing, **SMALL) for how in (False, True))
    assert exact.exact and not quick.exact
    assert peak(quick) == pytest.approx(peak(exact), rel=0.01)
    assert quick.state == pytest.approx(exact.state) and quick.gradients == pytest.approx(exact.gradients)
    assert len(quick.blocks) == 5 and sum(quick.blocks) == pytest.approx(sum(exact.blocks), rel=0.01)


def test_rows_grow_along_a_straight_line() -> None:
    one, two, eight = (trace("transformer", rows, False, **SMALL) for rows in (1, 2, 8))
    assert peak(with_rows(one, two, 8)) == pytest.approx(peak(eight), rel=0.02)


def test_the_pattern_of_blocks() -> None:
    dense, hnet = MODELS.get("transformer"), MODELS.get("hnet")
    assert period_of(dense, dense.Config.with_preset(None, **SMALL)) == (1, 5)
    assert period_of(hnet, hnet.Config.with_preset(None)) == (0, 6)  # no num_layers to shorten: the whole model is traced


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_moment_of_the_quick_trace_is_one_of_the_whole_model(checkpointing: bool) -> None:
    """Also what is never the peak of one process may be that of a shard."""
    cls = MODELS.get("transformer")
    config = cls.Config.with_preset(None, hidden_size=32, num_layers=5, num_heads=2, vocab_size=96, tie_embeddings=False)
    shape = Shape(2, 16, 1, "bf16", checkpointing)
    batch = cls.example(config, shape.micro_batch, shape.length)
    quick, whole = (trace_step(cls, config, NextToken(), shape, batch, exact=exact) for exact in (False, True))
    assert not quick.exact and whole.exact
    for moment in quick.moments:
        assert moment in whole.moments, (moment, [m for m in whole.moments if (m.part, m.block) == (moment.part, moment.block)])


def test_products_of_16_bits_are_counted_by_kind() -> None:
    """oneDNN keeps a program for each kind of product; the same shapes again, and fp32, make none."""
    cls = MODELS.get("transformer")
    counts = []
    for layers, precision in ((2, "fp32"), (2, "bf16"), (3, "bf16")):
        config = cls.Config.with_preset(None, hidden_size=32, num_layers=layers, num_heads=2, vocab_size=96)
        counts.append(trace_step(cls, config, NextToken(), Shape(2, 128, 1, precision, False), cls.example(config, 2, 128), exact=True).products)
    assert counts[0] == 0 < 10 < counts[1] == counts[2] < 40
