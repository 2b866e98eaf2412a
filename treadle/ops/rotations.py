"""Mixing matrices of a few streams: orthogonal ones by the Cayley transform, doubly stochastic ones by Sinkhorn or as
mixtures of permutations. All work on a batch of small matrices in fp32 and have no host reads.

A skew-symmetric A of size n is given by its n (n - 1) / 2 numbers above the diagonal, row by row (01, 02, ..., 12, ...).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.ops.first_order import first_order


def generator_count(n: int) -> int:
    """Free numbers of a skew-symmetric n x n matrix."""
    return n * (n - 1) // 2


def skew(numbers: Tensor, n: int) -> Tensor:
    """[..., n (n - 1) / 2] -> [..., n, n]."""
    above, below, zero = numbers.unbind(-1), (-numbers).unbind(-1), torch.zeros_like(numbers[..., 0])
    place = {pair: index for index, pair in enumerate(itertools.combinations(range(n), 2))}
    # Stacked, not multiplied with a constant matrix: a constant would have to live on each device and in each mode.
    entries = [zero if i == j else above[place[i, j]] if i < j else below[place[j, i]] for i in range(n) for j in range(n)]
    return torch.stack(entries, -1).unflatten(-1, (n, n))


def unskew(matrices: Tensor, n: int) -> Tensor:
    """The gradient of `skew`: [..., n, n] -> [..., n (n - 1) / 2]."""
    both = matrices - matrices.transpose(-1, -2)
    return torch.stack([both[..., i, j] for i, j in itertools.combinations(range(n), 2)], -1)


class _Cayley4(torch.autograd.Function):
    """(I + A)^-1 (I - A) of 4 x 4 skew matrices from their 6 numbers [N, 6], in closed form.

    With s the sum of squares, pf the Pfaffian and A* the dual (A A* = -pf I), A^3 = -s A + pf A*, so that
    M = (I + A)^-1 = ((1 + s) I - A + A^2 - pf A*) / (1 + s + pf^2), and the transform is 2 M - I. dM = -M dA M gives the
    gradient. Exactly orthogonal up to rounding, determinant +1.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        s = (p * p).sum(-1, keepdim=True)
        pf = p[:, :1] * p[:, 5:] - p[:, 1:2] * p[:, 4:5] + p[:, 2:3] * p[:, 3:4]
        first, second, third = p[:, :1], p[:, 1:2], p[:, 2:3]
        dual = torch.cat([p[:, 5:], -p[:, 4:5], p[:, 3:4], third, -second, first], -1)
        a = skew(p, 4)
        # A and pf A* are both skew: one matrix of numbers p + pf p*.
        whole = torch.baddbmm(skew(p + pf * dual, 4), a, a, beta=-1.0).view(-1, 16)
        whole[:, ::5] += 1.0 + s
        inverse = whole.div_(1.0 + s + pf * pf).view(-1, 4, 4)
        ctx.save_for_backward(inverse)
        out = inverse * 2.0
        out.view(-1, 16)[:, ::5] -= 1.0
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        turned = inverse.transpose(1, 2)
        return unskew(torch.bmm(torch.bmm(turned, grad), turned), 4) * -2.0


def cayley(numbers: Tensor, n: int) -> Tensor:
    """[..., n (n - 1) / 2] -> orthogonal [..., n, n] = (I + A)^-1 (I - A), fp32."""
    if n == 4 and not torch.compiler.is_compiling():
        return _Cayley4.apply(numbers.reshape(-1, 6)).view(*numbers.shape[:-1], 4, 4)  # type: ignore[no-untyped-call]
    return cayley_reference(numbers, n)


def cayley_reference(numbers: Tensor, n: int) -> Tensor:
    """The same by solving a linear system, any n. numbers [..., n (n - 1) / 2] -> [..., n, n]."""
    a, one = skew(numbers, n), torch.eye(n, device=numbers.device, dtype=numbers.dtype)
    return torch.linalg.solve_ex(one + a, one - a, check_errors=False).result  # checking would read the device back


def sinkhorn(logits: Tensor, steps: int = 20) -> Tensor:
    """[..., n, n] -> rows and columns sum to 1 (mHC, arXiv 2512.24880: 20 steps), in the log domain."""
    for _ in range(steps):
        logits = logits - logits.logsumexp(-1, keepdim=True)
        logits = logits - logits.logsumexp(-2, keepdim=True)
    return logits.exp()


def sinkhorn_lean(logits: Tensor, steps: int = 20) -> Tensor:
    """The cheapest form: one exp, then divisions by row and column sums. logits [..., n, n] -> [..., n, n]."""
    table = (logits - logits.amax((-2, -1), keepdim=True)).exp()
    for _ in range(steps):
        table = table / table.sum(-1, keepdim=True)
        table = table / table.sum(-2, keepdim=True)
    return table


def permutations(n: int, device: torch.device) -> Tensor:
    """[n!, n n], the identity first. Made once for each GPU, which would wait for it in each layer of each step."""
    if (n, device) in _permutations and not torch.compiler.is_compiling():
        return _permutations[n, device]
    with torch.inference_mode(False):  # gradients may be asked for the next time
        orders = torch.tensor(list(itertools.permutations(range(n))), device=device)
        table = F.one_hot(orders, n).flatten(1).float()
    if device.type == "cuda" and type(table) is Tensor:
        _permutations[n, device] = table
    return table


_permutations: dict[tuple[int, torch.device], Tensor] = {}


def birkhoff(logits: Tensor, n: int) -> Tensor:
    """[..., n!] -> doubly stochastic [..., n, n], a mixture of permutations (mHC-lite, arXiv 2601.05732)."""
    return (logits.softmax(-1) @ permutations(n, logits.device)).unflatten(-1, (n, n))
