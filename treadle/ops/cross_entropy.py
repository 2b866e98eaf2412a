"""Cross-entropy of a linear head without ever holding all logits.

Per chunk of positions: logits, loss, and (when training) both gradients, in the forward pass. With a vocabulary of 32k this
takes 42% less peak memory than the plain form at equal speed; the plain form stands beside it as the reference.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.ops.cross_entropy_triton import cross_entropy_rows, runs_here
from treadle.ops.first_order import first_order
from treadle.ops.fused import KINDS, kernels, threads_for
from treadle.ops.kernel_inputs import address
from treadle.ops.linear import product
from treadle.ops.planned import gpu_is_planned
from treadle.ops.precision import compute_dtype, without_autocast

IGNORE = -100
CHUNK_NUMBERS = 1 << 20  # logits held at a time on a CPU, where they stay in its cache: 512 positions at V = 2048
# On a GPU: 5120 positions at V = 50304, .5 GB in bf16. Each chunk adds to the weight's whole gradient; with half of that the whole
# takes 4% longer (H200).
GPU_CHUNK_NUMBERS = 1 << 28
GPU_CHUNK_STEP = 256  # rows of a tile of the GPU's products: 2668 positions take 14% longer each than 2560 (H200)


def chunk_of(vocabulary: int, device: torch.device) -> int:
    """How many positions have logits at a time, never fewer than 64."""
    if device.type == "cuda" or gpu_is_planned():
        return max(1, GPU_CHUNK_NUMBERS // vocabulary // GPU_CHUNK_STEP) * GPU_CHUNK_STEP
    return max(64, CHUNK_NUMBERS // vocabulary)


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """Sum over labels != -100 of -log softmax(hidden weight^T)[label], in nats; softcap c: logits z become c tanh(z / c)."""
    logits = F.linear(hidden, weight).float()
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def _nats(logits: Tensor, labels: Tensor, softcap: float | None, slopes: bool) -> Tensor:
    """logits [C, V], labels [C] -> the sum of nats where scored; with slopes the logits become its derivative by them, zero
    where no label is."""
    native = kernels(logits)
    if native is not None:
        nats, labels = logits.new_empty(logits.shape[0], dtype=torch.float32), labels.to(logits.device, torch.int64).contiguous()
        failed = native.cross_entropy(
            address(logits), KINDS[logits.dtype], address(labels), IGNORE, softcap or 0.0, address(nats), slopes, *logits.shape,
            threads_for(logits.numel()),
        )  # fmt: skip
        if failed:
            outside = labels[(labels != IGNORE) & ((labels < 0) | (labels >= logits.shape[1]))]
            raise IndexError(f"a label is not in 0 .. {logits.shape[1] - 1}, nor {IGNORE}: {int(outside[0])}")
        return nats.sum()
    if runs_here(logits):
        return cross_entropy_rows(logits, labels.to(torch.int64).contiguous(), IGNORE, softcap or 0.0, slopes).sum()
    scored = (labels != IGNORE)[:, None]
    target = labels[:, None].to(torch.int64).masked_fill(~scored, 0)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    nats = torch.log_softmax(logits, -1, dtype=torch.float32).gather(1, target)
    if slopes:
        # A second softmax pass in the logits' type costs less than exp of the first and a conversion.
        slope = torch.softmax(logits, -1)
        slope.scatter_add_(1, target, torch.full_like(target, -1, dtype=logits.dtype))
        if softcap is not None:  # d c tanh(z / c) / d z = 1 - tanh^2
            slope -= slope * logits.div_(softcap).square_()
        torch.mul(slope, scored, out=logits)
    return -(nats * scored).sum()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [V, D] += left right, in place."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda" and not gpu_is_planned():  # a third less time than a product of its own and a sum (H200)
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, chunk: int, train: bool, softcap: float | None
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        cast_weight = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if train else None
        # Of a frozen head no gradient is kept: with adapters it would be the largest tensor of all.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if train and ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], chunk):
            part = hidden[start : start + chunk].to(dtype)
            logits = product(part, cast_weight)  # [C, V]
            total += _nats(logits, labels[start : start + chunk], softcap, train)
            if grad_hidden is None:
                continue
            torch.mm(logits, cast_weight, out=grad_hidden[start : start + chunk])
            if grad_weight is None:
                continue
            _add_product(grad_weight, logits.t(), part)
        if train:
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype, ctx.hidden_dtype = weight.dtype, hidden.dtype
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            (grad_hidden * grad).to(ctx.hidden_dtype),
            (grad_weight * grad).to(ctx.weight_dtype) if grad_weight is not None else None,
            None,
            None,
            None,
            None,
            None,
        )


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """hidden [B, T, D] (or [N, D]), weight [V, D], labels [B, T] -> the sum of nats, a fresh fp32 scalar. softcap c: logits z
    become c tanh(z / c). ValueError where there is not one label for each position."""
    flat, target = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if flat.shape[0] != target.shape[0]:  # a kernel would read past the end
        raise ValueError(f"labels {list(labels.shape)} for hidden states {list(hidden.shape)}: one for each position is needed")
    chunk = chunk_of(weight.shape[0], hidden.device)
    train = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    dtype = compute_dtype(hidden)
    with without_autocast(hidden):  # on a GPU it would make a softmax in bf16 fp32
        return _LinearCrossEntropy.apply(flat, weight, target, dtype, chunk, train, softcap)  # type: ignore[no-untyped-call]
