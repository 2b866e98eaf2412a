"""The rows of a cross-entropy on a GPU in one Triton kernel: logits in, nats out, and the logits become their derivative in place.

Plain torch makes six passes over the logits and an fp32 copy of them; this reads them twice and writes them once. The sum of
exponentials is kept with its maximum in one pass (Milakov and Gimelshein 2018, arXiv 1805.02867), in fp32.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from treadle.ops.planned import gpu_is_planned

BLOCK = 4096  # logits of a row at a time


@functools.cache
def triton_is_installed() -> bool:
    """Whether the package triton, which torch's CUDA builds bring, can be imported."""
    return importlib.util.find_spec("triton") is not None


def runs_here(logits: Tensor) -> bool:
    """Whether this kernel takes them: on CUDA (or where memory is planned for it), outside a compiler. logits [N, V]."""
    if torch.compiler.is_compiling():
        return False
    return gpu_is_planned() or (logits.device.type == "cuda" and triton_is_installed())


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def rows(logits, labels, nats, stride, softcap, ignore: tl.constexpr, vocabulary: tl.constexpr, SLOPES: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        own = logits + row * stride
        label = tl.load(labels + row)
        valid = (label >= 0) & (label < vocabulary)
        # Read before the first barrier of a reduction: below, another warp may already overwrite it.
        target = tl.load(own + label, mask=valid, other=0.0).to(tl.float32)
        if CAP:
            target = softcap * (2 * tl.sigmoid(2 * target / softcap) - 1)
        largest = float("-inf")
        total = 0.0
        for start in range(0, vocabulary, BLOCK):
            place = start + tl.arange(0, BLOCK)
            z = tl.load(own + place, mask=place < vocabulary, other=float("-inf")).to(tl.float32)
            if CAP:
                z = tl.where(place < vocabulary, softcap * (2 * tl.sigmoid(2 * z / softcap) - 1), float("-inf"))
            higher = tl.maximum(largest, tl.max(z, 0))
            total = total * tl.exp(largest - higher) + tl.sum(tl.exp(z - higher), 0)
            largest = higher
        normaliser = largest + tl.log(total)
        scored = label != ignore
        wrong = scored & ((label < 0) | (label >= vocabulary))
        loss = tl.where(scored, normaliser - target, 0.0)
        tl.store(nats + row, tl.where(wrong, float("nan"), loss))
        if SLOPES:
            for start in range(0, vocabulary, BLOCK):
                place = start + tl.arange(0, BLOCK)
                z = tl.load(own + place, mask=place < vocabulary, other=0.0).to(tl.float32)
                if CAP:
                    bent = 2 * tl.sigmoid(2 * z / softcap) - 1
                    slope = (tl.exp(softcap * bent - normaliser) - tl.where(place == label, 1.0, 0.0)) * (1 - bent * bent)
                else:
                    slope = tl.exp(z - normaliser) - tl.where(place == label, 1.0, 0.0)
                tl.store(own + place, tl.where(scored, slope, 0.0).to(logits.dtype.element_ty), mask=place < vocabulary)

    return rows


@torch.library.custom_op("treadle::cross_entropy_rows", mutates_args=("logits",))
def cross_entropy_rows(logits: Tensor, labels: Tensor, ignore: int, softcap: float, slopes: bool) -> Tensor:
    """logits [C, V], labels int64 [C] -> nats fp32 [C], 0 where the label is `ignore` and NaN where it is no token (a GPU raises
    nothing). With `slopes` the logits become the derivative of the nats by them. softcap 0: none."""
    nats = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _kernel()[(logits.shape[0],)](
        logits, labels, nats, logits.stride(0), softcap or 1.0, ignore, logits.shape[1], slopes, softcap != 0.0, BLOCK, num_warps=8
    )
    return nats


@cross_entropy_rows.register_fake
def _(logits: Tensor, labels: Tensor, ignore: int, softcap: float, slopes: bool) -> Tensor:
    return torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
