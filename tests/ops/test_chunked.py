"""The chunked recurrences and block-sparse attention against a plain loop and a dense mask: values, last states, all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.ops.block_sparse_attention import block_sparse_attention, block_sparse_attention_reference
from treadle.ops.delta_rule import delta_rule, delta_rule_reference
from treadle.ops.scan import scan, scan_reference
from treadle.ops.ssd import ssd, ssd_reference
from treadle.ops.wkv import wkv, wkv_reference

BOUND = {torch.float64: 1e-9, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", list(BOUND), ids=["fp64", "fp32"])
# (rows, length): one position, one chunk that is not full, and three chunks with documents that begin anywhere.
LENGTHS = pytest.mark.parametrize("length", [1, 37, 150])
DOCUMENTS = torch.tensor([[0] * 30 + [1] * 40 + [2] * 1 + [3] * 70 + [-1] * 9, [0] * 64 + [1] * 64 + [2] * 22])
N, P, HEADS = 6, 5, 3


def gates(*shape: int) -> Tensor:
    """What comes before softplus or sigmoid: ordinary, and shut or wide open as far as +-30."""
    values = torch.randn(shape)
    return torch.where(torch.rand(shape) < 0.2, 30.0 * torch.randn(shape).sign(), values)


def inputs(kind: str, length: int) -> list[Tensor]:
    torch.manual_seed(length)
    first, second, v = torch.randn(2, HEADS, length, N) * 0.5, torch.randn(2, HEADS, length, N) * 0.5, torch.randn(2, HEADS, length, P)
    if kind == "wkv":
        return [first, second, v, -gates(2, HEADS, length, N).clamp(max=5).exp(), torch.randn(HEADS, N)]
    log_decay = -2.0 * F.softplus(gates(2, HEADS, length))
    if kind == "ssd":
        return [v, log_decay, first, second]
    return [first, F.normalize(second, dim=-1), v, log_decay, torch.sigmoid(gates(2, HEADS, length))]


KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "ssd": (lambda *a: ssd(*a, precise=True), ssd_reference),
    "delta rule": (delta_rule, delta_rule_reference),
    "wkv": (wkv, wkv_reference),
}


def results(function: Callable[..., Any], given: list[Tensor], *more: Any) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in given]
    found = function(*leaves, *more)
    found = found if isinstance(found, tuple) else (found,)
    sum((t * torch.arange(t.numel(), dtype=t.dtype).view(t.shape).cos()).sum() for t in found).backward()
    return [*(t.detach() for t in found), *(t.grad for t in leaves if t.grad is not None)]


def agree(found: list[Tensor], wanted: list[Tensor], bound: float) -> None:
    assert len(found) == len(wanted)
    for number, (a, b) in enumerate(zip(found, wanted)):
        assert bool(b.isfinite().all()) and (a - b).abs().max() <= bound * max(1.0, float(b.abs().max())), number


@DTYPES
@LENGTHS
@pytest.mark.parametrize("packed", [False, True], ids=["row", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_the_loop(kind: str, packed: bool, length: int, dtype: torch.dtype) -> None:
    """Also with gates at +-30, where a product of exponentials of both signs would overflow."""
    fast, slow = KINDS[kind]
    given = [t.to(dtype) for t in inputs(kind, length)]
    documents = DOCUMENTS[:, :length] if packed else None
    initial = torch.randn(2, HEADS, N, P).to(dtype)
    for start in (None, initial):
        agree(results(fast, given, documents, start), results(slow, given, documents, start), BOUND[dtype])
    # Of the state before the row, too.
    agree(results(lambda s: fast(*given, documents, s), [initial]), results(lambda s: slow(*given, documents, s), [initial]), BOUND[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_small_chunks_pass_gradcheck(kind: str) -> None:
    fast, _ = KINDS[kind]
    given = [t[:1].double() if t.dim() > 2 else t.double() for t in inputs(kind, 7)]
    given = [t.clamp(min=-20.0) if t.max() <= 0 else t for t in given]  # finite differences need some slope
    small = [t.requires_grad_() for t in given]
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    functions = {"ssd": ssd, "delta rule": delta_rule, "wkv": wkv}
    assert torch.autograd.gradcheck(lambda *a: functions[kind](*a, documents, None, 4), small, atol=1e-6)  # type: ignore[operator]
    assert fast is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_does_not_move_a_bit_of_another(kind: str) -> None:
    fast, _ = KINDS[kind]
    given = inputs(kind, 150)
    other = DOCUMENTS == 1
    changed = [torch.where(other[:, None, :, *([None] * (t.dim() - 3))], t * 0.5 - 0.1 * (t <= 0), t) if t.dim() > 2 else t for t in given]
    before, after = fast(*given, DOCUMENTS)[0], fast(*changed, DOCUMENTS)[0]
    mask = other[:, None, :, None].expand_as(before)
    assert torch.equal(before[~mask], after[~mask]) and not torch.equal(before[mask], after[mask])


@pytest.mark.parametrize("kind", KINDS)
def test_memory_stays_bounded_over_a_long_row(kind: str) -> None:
    """4096 positions in fp32 against fp64: no drift with the length."""
    fast, _ = KINDS[kind]
    given = [t[:1] if t.dim() > 2 else t for t in inputs(kind, 4096)]
    exact, found = fast(*(t.double() for t in given))[0], fast(*given)[0]
    assert (found - exact).abs().max() <= 1e-5 * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("kind", ["ssd", "delta rule"])
def test_a_small_decay_after_great_ones_is_exact(kind: str) -> None:
    """Running sums reach -30 000, where fp32 has steps of .002; what is left between two neighbours does not feel it."""
    given = inputs(kind, 64)
    place = 1 if kind == "ssd" else 3
    given[place] = torch.full((2, HEADS, 64), -0.3)
    given[place][:, :, :60] = -500.3
    fast, slow = KINDS[kind]
    assert (fast(*given)[0] - slow(*(t.double() for t in given))[0]).abs().max() <= 2e-6


def test_equal_keys_are_solved_by_substitution() -> None:
    """Powers of a triangular matrix of ones reach 10^18 within a chunk; the solve stays exact."""
    k = F.normalize(torch.ones(1, 1, 64, N), dim=-1)
    given = [k, k, torch.randn(1, 1, 64, P, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 1, 64), torch.ones(1, 1, 64)]
    exact = results(delta_rule_reference, [t.double() for t in given])
    agree(results(delta_rule, given), [t.float() for t in exact], 1e-5)


@DTYPES
@pytest.mark.parametrize("size, previous, global_tokens", [(8, 1, 3), (16, 0, 0), (8, 2, 20), (5, 1, 1), (200, 1, 4)])
def test_block_sparse_attention_is_the_mask(size: int, previous: int, global_tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for length in (1, 150):
        given = [torch.randn(2, 2, length, 8, dtype=dtype) for _ in range(3)]
        for documents in (None, DOCUMENTS[:, :length]):
            keys = (size, previous, global_tokens, documents)
            agree(results(block_sparse_attention, given, *keys), results(block_sparse_attention_reference, given, *keys), BOUND[dtype])


def test_block_sparse_attention_sees_what_it_says() -> None:
    """By hand: position 10 of a document, blocks of 4, one before, 2 global tokens: 0, 1 and 4 .. 10."""
    q, v = torch.zeros(1, 1, 13, 16), torch.eye(13)[None, None]
    found = block_sparse_attention(q, q, torch.cat([v, v.new_zeros(1, 1, 13, 3)], -1), 4, 1, 2)
    assert (found[0, 0, 10, :13] > 0).nonzero().flatten().tolist() == [0, 1, 4, 5, 6, 7, 8, 9, 10]
    doc_ids = torch.tensor([[0] * 2 + [1] * 11])  # the same, counted from position 2
    found = block_sparse_attention(q, q, torch.cat([v, v.new_zeros(1, 1, 13, 3)], -1), 4, 1, 2, doc_ids)
    assert (found[0, 0, 12, :13] > 0).nonzero().flatten().tolist() == [2, 3, 6, 7, 8, 9, 10, 11, 12]


def test_the_recurrence_in_fp64() -> None:
    torch.manual_seed(0)
    given = [torch.sigmoid(gates(2, 60, 7)).double(), torch.randn(2, 60, 7).double(), torch.randn(2, 7).double()]
    agree(results(scan, given), results(scan_reference, given), 1e-9)


def test_documents_with_large_ids_stay_apart() -> None:
    """A last chunk is filled with the last position's document, whatever its number (fp32 knows no odd one above 2^24)."""
    torch.manual_seed(0)
    x, b, c = (torch.randn(1, 2, 70, 8, dtype=torch.float64) for _ in range(3))
    decay = -torch.rand(1, 2, 70, dtype=torch.float64)
    documents = (2**24 + (torch.arange(70) >= 35).long())[None]
    torch.testing.assert_close(ssd(x, decay, b, c, documents)[0], ssd_reference(x, decay, b, c, documents)[0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("channels", [64, 65, 128, 129])
def test_bonus_with_fixed_decays(channels: int) -> None:
    """More channels than the kernel works on together, and no gradient of the decay, for which no memories are kept."""
    torch.manual_seed(0)
    given = [torch.randn(1, 2, 37, n) for n in (channels, channels, P)]
    decay, bonus = -torch.rand(1, 2, 37, channels), torch.randn(2, channels)
    plain = results(lambda r, k, v: wkv_reference(r, k, v, decay, bonus), given)
    agree(results(lambda r, k, v: wkv(r, k, v, decay, bonus), given), plain, BOUND[torch.float32])
