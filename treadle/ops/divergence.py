"""Kullback-Leibler divergence between two linear heads without ever holding all logits (as ops/cross_entropy.py)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.ops.cross_entropy import IGNORE, chunk_of
from treadle.ops.first_order import first_order
from treadle.ops.precision import compute_dtype


def linear_divergence_reference(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """Sum over positions with a label of KL(p_teacher || p_student) at a temperature, in nats. hidden [B, T, D], weight
    [V, D], labels [B, T] -> a scalar."""
    ours = F.log_softmax(F.linear(hidden, weight).float() / temperature, -1)
    theirs = F.log_softmax(F.linear(teacher_hidden, teacher_weight).float() / temperature, -1)
    return ((theirs.exp() * (theirs - ours)).sum(-1) * (labels != IGNORE)).sum()


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, their_hidden: Tensor, their_weight: Tensor, scored: Tensor, temperature: float,
        dtype: torch.dtype, chunk: int, train: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        total = hidden.new_zeros((), dtype=torch.float32)
        agreed = hidden.new_zeros((), dtype=torch.float32)
        cast, their_cast = weight.to(dtype), their_weight.to(dtype)
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if train else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if train and ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], chunk):
            here = slice(start, start + chunk)
            part, counted = hidden[here].to(dtype), scored[here, None]
            logits, their_logits = part @ cast.t(), their_hidden[here].to(dtype) @ their_cast.t()
            agreed += ((logits.argmax(-1) == their_logits.argmax(-1)) & scored[here]).sum()
            ours = torch.log_softmax(logits.float() / temperature, -1)
            theirs = torch.log_softmax(their_logits.float() / temperature, -1)
            share = theirs.exp()
            total += ((share * (theirs - ours)).sum(-1, keepdim=True) * counted).sum()
            if grad_hidden is None:
                continue
            slope = ((ours.exp() - share) * counted / temperature).to(dtype)  # d KL / d logits
            grad_hidden[here] = slope @ cast
            if grad_weight is not None:
                grad_weight += slope.t() @ part
        if train:
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(agreed)
        return total, agreed

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        of_weight = (grad_weight * grad).to(ctx.dtypes[1]) if grad_weight is not None else None
        return (grad_hidden * grad).to(ctx.dtypes[0]), of_weight, *(None,) * 7


def linear_divergence(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """hidden [B, T, D], weight [V, D], the teacher's [B, T, D'] and [V, D'], labels [B, T] -> (sum of KL(p_teacher ||
    p_student) over positions with a label, in nats; number of those positions where both find the same token likeliest). ValueError where
    there is not one label, and one state of the teacher, for each position."""
    flat, theirs = hidden.reshape(-1, hidden.shape[-1]), teacher_hidden.reshape(-1, teacher_hidden.shape[-1])
    chunk = chunk_of(weight.shape[0], hidden.device)
    train = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    scored = labels.reshape(-1) != IGNORE
    if not flat.shape[0] == theirs.shape[0] == scored.shape[0]:
        raise ValueError(f"labels {list(labels.shape)}, hidden states {list(hidden.shape)} and a teacher's {list(teacher_hidden.shape)}: "
                         "they are not of the same positions")  # fmt: skip
    return _LinearDivergence.apply(  # type: ignore[no-untyped-call]
        flat, weight, theirs.detach(), teacher_weight.detach(), scored, temperature, compute_dtype(hidden), chunk, train
    )
