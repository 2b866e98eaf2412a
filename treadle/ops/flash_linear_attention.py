"""The chunked recurrences as Triton kernels of the package flash-linear-attention, where it is installed and fits: on CUDA, in 16
bits (its kernels take no fp32), over whole rows or documents whose lengths the host knows.

A kernel is used only after it has agreed, forward and backward, with the plain loop on a small input of the same device and type in
this process; otherwise a warning says so once, and the products of matrices in ops/ go on. (Its layouts and names have changed
from version to version.)
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.ops.delta_rule import delta_rule_reference
from treadle.ops.documents import Segments
from treadle.ops.kernel_trial import agreed
from treadle.ops.ssd import ssd_reference
from treadle.ops.wkv import wkv_reference

Arguments = tuple[Tensor, ...]
PLACES = {
    "ssd": ("fla.ops.simple_gla", "chunk_simple_gla"),
    "delta_rule": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    "wkv": ("fla.ops.rwkv6", "chunk_rwkv6"),
}
SLOW_TO_TUNE = ("wkv",)  # 43 s for one of its kernels, more than 270 for the sample below (H100, Triton 3.6)
REFERENCES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "ssd": ssd_reference, "delta_rule": delta_rule_reference, "wkv": wkv_reference,
}  # fmt: skip
SMALLEST_WIDTH, LARGEST_WIDTH = 16, 256  # of a tile in a Triton product; what the kernels assert
BOUND = 3e-2  # relative error of bf16 products over 80 positions, forward and backward; a wrong layout is off by 1


def flash(kind: str, dtype: torch.dtype, doc_ids: Tensor | None, segments: Segments | None, *given: Tensor) -> Tensor | None:
    """y [B, H, T, P] of ops.ssd, ops.delta_rule or ops.wkv of `given`, computed in `dtype`; None where no kernel fits."""
    first = given[0]
    if first.device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or first.dtype != torch.float32:
        return None
    if type(first) is not Tensor or torch.compiler.is_compiling() or (doc_ids is not None and segments is None):
        return None
    widths = [t.shape[-1] for t in given if t.dim() == 4]
    if min(widths) < SMALLEST_WIDTH or max(widths) > LARGEST_WIDTH or not agrees(kind, dtype, str(first.device)):
        return None
    ends = None
    if doc_ids is not None and segments is not None:
        lengths = torch.tensor([0, *(abs(run) for row in segments for run in row)], dtype=torch.int64)
        ends = lengths.cumsum(0).to(first.device, non_blocking=True)
    return called(kind, dtype, ends, *given)


@functools.cache
def _kernel(kind: str) -> Callable[..., Any] | None:
    module, name = PLACES[kind]
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None
    except Exception as problem:  # whatever another package raises, training goes on without it
        warnings.warn(f"{module} cannot be imported: {problem}", stacklevel=2)
        return None


def called(kind: str, dtype: torch.dtype, ends: Tensor | None, *given: Tensor) -> Tensor:
    """The kernel on arguments in our order and layout; `ends`: where documents end in the rows one after another, int64 [N + 1]."""
    kernel = _kernel(kind)
    assert kernel is not None
    rows, heads = given[0].shape[:2]

    def laid_out(t: Tensor) -> Tensor:  # [B, H, T, ...] -> [B, T, H, ...], or [1, B T, H, ...] with documents
        t = t.expand(rows, heads, *t.shape[2:]).transpose(1, 2).contiguous()
        return t if ends is None else t.flatten(0, 1)[None]

    more: dict[str, Any] = {"scale": 1.0, **({} if ends is None else {"cu_seqlens": ends})}
    if kind == "ssd":
        x, log_decay, b, c = (laid_out(t) for t in given)
        y = kernel(c.to(dtype), b.to(dtype), x.to(dtype), g=log_decay, **more)[0]
    elif kind == "delta_rule":
        q, k, v, log_decay, beta = (laid_out(t) for t in given)
        y = kernel(q.to(dtype), k.to(dtype), v.to(dtype), g=log_decay, beta=beta, **more)[0]
    else:
        r, k, v, log_decay = (laid_out(t) for t in given[:4])
        y = kernel(r.to(dtype), k.to(dtype), v.to(dtype), log_decay, given[4], **more)[0]
    y = y if ends is None else y[0].unflatten(0, (rows, -1))
    return y.transpose(1, 2).to(given[0].dtype)


def sample(kind: str, device: str) -> Arguments:
    """Small arguments of the recurrence: two rows, two heads, 80 positions (a chunk and a part of one), widths of 32."""
    generator = torch.Generator().manual_seed(0)
    first, second, v = (torch.randn(2, 2, 80, 32, generator=generator).to(device) * 0.3 for _ in range(3))
    log_decay = -torch.rand(2, 2, 80, generator=generator).to(device)
    if kind == "ssd":
        return v, log_decay, first, second
    if kind == "delta_rule":
        return first, F.normalize(second, dim=-1), v, log_decay, torch.rand(2, 2, 80, generator=generator).to(device)
    return first, second, v, log_decay[..., None] * torch.rand(32, generator=generator).to(device), torch.ones(2, 32, device=device) * 0.5


@functools.cache
def agrees(kind: str, dtype: torch.dtype, device: str) -> bool:
    """Whether the kernel is there and gives the loop's values and gradients, with and without documents."""
    if _kernel(kind) is None:
        return False
    if kind in SLOW_TO_TUNE:
        warnings.warn(f"trying flash-linear-attention's {PLACES[kind][1]}: Triton tunes it now, which can take more than five minutes; "
                      "its choice is kept on disk for later runs", stacklevel=2)  # fmt: skip
    return agreed(f"flash-linear-attention's {PLACES[kind][1]}", "the loop", BOUND, lambda: _pairs(kind, dtype, device))


def _pairs(kind: str, dtype: torch.dtype, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    documents = (torch.arange(80, device=device) >= 50).long().expand(2, -1)
    ends = torch.tensor([0, 50, 80, 130, 160], device=device)
    for packed in (False, True):
        found = []
        for fast in (True, False):
            leaves = [t.clone().requires_grad_() for t in sample(kind, device)]
            if fast:
                y = called(kind, dtype, ends if packed else None, *leaves)
            else:
                y = REFERENCES[kind](*leaves, documents if packed else None)[0]
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
        yield from zip(*found)
