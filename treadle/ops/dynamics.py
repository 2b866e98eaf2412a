"""INL dynamics: one step of a damped pull of h towards a learned equilibrium mu, with gains that each token chooses.

    [a, b, g] = W2 silu(W1 [h; v] + c1) + c2
    alpha = sigmoid(a); beta = min(softplus(b), beta_max); gate = sigmoid(g)
    v' = clamp(alpha v - beta (h - clamp(mu, mu_min, mu_max)), -velocity_max, velocity_max)
    h' = h + step gate v'

Autograd would keep some ten tensors of h's size for the gradients of the gains. All of them follow from h and v by two
products with a width of 64, so that the function below keeps h, v and nothing else, and computes them again in backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.ops import dynamics_kernels
from treadle.ops.first_order import first_order
from treadle.ops.precision import compute_dtype, without_autocast


class Limits(NamedTuple):
    """The constants of the equations."""

    step: float = 0.1
    beta_max: float = 2.0
    velocity_max: float = 10.0
    mu_min: float = 0.0
    mu_max: float = 2.0


def dynamics_reference(
    h: Tensor, v: Tensor, mu: Tensor, w1: Tensor, c1: Tensor, w2: Tensor, c2: Tensor, limits: Limits
) -> tuple[Tensor, Tensor]:
    """The equations as they stand: h, v [..., D], mu [D], w1 [C, 2D], c1 [C], w2 [3D, C], c2 [3D] -> (h', v')."""
    a, b, g = F.linear(F.silu(F.linear(torch.cat((h, v), -1), w1, c1)), w2, c2).chunk(3, -1)
    alpha, beta, gate = torch.sigmoid(a), F.softplus(b).clamp(max=limits.beta_max), torch.sigmoid(g)
    pull = alpha * v - beta * (h - mu.clamp(limits.mu_min, limits.mu_max))
    velocity = pull.clamp(-limits.velocity_max, limits.velocity_max)
    return h + limits.step * gate * velocity, velocity


def gains(
    h: Tensor, v: Tensor, w1: Tensor, c1: Tensor, w2: Tensor, c2: Tensor, beta_max: float, products: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(alpha, beta, gate), each [N, D], of h, v [N, D]; the two products are computed in `products`."""
    _, logits = _controller(h, v, w1, c1, w2, c2, products)
    width = h.shape[-1]
    beta = F.softplus(logits[:, width : 2 * width]).clamp(max=beta_max)
    shares = torch.sigmoid(logits)  # of b too: one pass over neighbouring numbers takes less than two over every third
    return shares[:, :width], beta, shares[:, 2 * width :]


def _controller(
    h: Tensor, v: Tensor, w1: Tensor, c1: Tensor, w2: Tensor, c2: Tensor, products: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(what silu reads [N, C], [a, b, g] [N, 3D]); without a copy of h and v side by side."""
    inner, logits = _narrow_controller(h, v, w1, c1, w2, c2, products)
    return inner, _wide(logits)


def _narrow_controller(
    h: Tensor, v: Tensor, w1: Tensor, c1: Tensor, w2: Tensor, c2: Tensor, products: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same with [a, b, g] in the type of the products."""
    of_h, of_v = w1.to(products).split(h.shape[-1], 1)
    inner = torch.addmm(c1.to(products), h.to(products), of_h.t())
    inner = torch.addmm(inner, v.to(products), of_v.t())
    return inner, torch.addmm(c2.to(products), F.silu(inner), w2.to(products).t())


def _wide(x: Tensor) -> Tensor:
    """At least fp32: a velocity is a sum over depth, and .05 of one is added to h."""
    return x if x.dtype == torch.float64 else x.float()


class _Dynamics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, v: Tensor, mu: Tensor, w1: Tensor, c1: Tensor, w2: Tensor, c2: Tensor, limits: Limits,
        products: torch.dtype,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.save_for_backward(h, v, mu, w1, c1, w2, c2)
        ctx.limits, ctx.products = limits, products
        rows, velocities = h.flatten(0, -2), v.flatten(0, -2)
        ctx.compiled = dynamics_kernels.available(h, v, mu, w1, c1, w2, c2, products=products)
        if ctx.compiled:
            rows, velocities = rows.contiguous(), velocities.contiguous()
            _, logits = _narrow_controller(rows, velocities, w1, c1, w2, c2, products)
            return tuple(t.view(h.shape) for t in dynamics_kernels.moved(logits, rows, velocities, mu.contiguous(), limits))
        alpha, beta, gate = gains(rows, velocities, w1, c1, w2, c2, limits.beta_max, products)
        gap = _wide(rows) - mu.clamp(limits.mu_min, limits.mu_max)
        velocity = alpha.mul_(velocities).sub_(beta.mul_(gap)).clamp_(-limits.velocity_max, limits.velocity_max)
        moved = gate.mul_(velocity).mul_(limits.step).add_(rows)
        out = torch.promote_types(h.dtype, v.dtype)
        return moved.to(out).view(h.shape), velocity.to(out).view(h.shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_h: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        h, v, mu, w1, c1, w2, c2 = saved = ctx.saved_tensors  # read once, as checkpointing wants it
        limits, products = ctx.limits, ctx.products
        rows, velocities, width = h.flatten(0, -2), v.flatten(0, -2), h.shape[-1]
        if ctx.compiled:
            rows, velocities = rows.contiguous(), velocities.contiguous()
            inner, logits = _narrow_controller(rows, velocities, w1, c1, w2, c2, products)
            narrow, *slopes = dynamics_kernels.slopes(
                logits, rows, velocities, mu.contiguous(), limits, *(g.flatten(0, -2).contiguous() for g in (grad_h, grad_v))
            )
            return _Dynamics._through_controller(products, saved, rows, velocities, inner, narrow, *slopes)
        inner, logits = _controller(rows, velocities, w1, c1, w2, c2, products)
        alpha, slope, gate = torch.sigmoid(logits).chunk(3, 1)  # slope: the derivative of softplus
        soft = F.softplus(logits[:, width : 2 * width])
        beta = soft.clamp(max=limits.beta_max)
        gap = _wide(rows) - mu.clamp(limits.mu_min, limits.mu_max)
        pull = (alpha * velocities).addcmul_(beta, gap, value=-1.0)
        grad_h, grad_v = _wide(grad_h.flatten(0, -2)), _wide(grad_v.flatten(0, -2))

        kept = pull.abs() <= limits.velocity_max  # the clamps pass what lies on their bounds, as torch's do
        grad_pull = torch.addcmul(grad_v, grad_h, gate, value=limits.step).mul_(kept)
        velocity = pull.clamp_(-limits.velocity_max, limits.velocity_max)
        grad_logits, (grad_a, grad_b, grad_g) = logits, logits.chunk(3, 1)  # they are read no more
        torch.ops.aten.sigmoid_backward.grad_input(grad_pull * velocities, alpha, grad_input=grad_a)
        torch.mul(slope, gap.mul_(grad_pull).mul_(soft <= limits.beta_max), out=grad_b).neg_()
        torch.ops.aten.sigmoid_backward.grad_input(velocity.mul_(grad_h).mul_(limits.step), gate, grad_input=grad_g)
        pulled = grad_pull * beta
        inside = (mu >= limits.mu_min) & (mu <= limits.mu_max)
        grad_mu = pulled.sum(0) * inside
        grad_rows, grad_velocities = grad_h - pulled, grad_pull.mul_(alpha)

        narrow = grad_logits.to(products)
        return _Dynamics._through_controller(
            products, saved, rows, velocities, inner, narrow, grad_rows, grad_velocities, grad_mu, grad_logits.sum(0)
        )

    @staticmethod
    def _through_controller(
        products: torch.dtype, saved: tuple[Tensor, ...], rows: Tensor, velocities: Tensor, inner: Tensor, narrow: Tensor,
        grad_rows: Tensor, grad_velocities: Tensor, grad_mu: Tensor, grad_c2: Tensor,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """All gradients, from those of [a, b, g] in the type of the products, `narrow`, and of h and v but for the controller's."""
        h, v, mu, w1, c1, w2, c2 = saved
        of_h, of_v = w1.to(products).split(h.shape[-1], 1)
        grad_inner = torch.ops.aten.silu_backward(narrow @ w2.to(products), inner)
        grad_w1 = torch.cat((grad_inner.t() @ rows.to(products), grad_inner.t() @ velocities.to(products)), 1)
        grad_rows += grad_inner @ of_h
        grad_velocities += grad_inner @ of_v
        return (
            grad_rows.to(h.dtype).view(h.shape), grad_velocities.to(v.dtype).view(v.shape), grad_mu.to(mu.dtype),
            grad_w1.to(w1.dtype), _wide(grad_inner).sum(0).to(c1.dtype), (narrow.t() @ F.silu(inner)).to(w2.dtype),
            grad_c2.to(c2.dtype), None, None,
        )  # fmt: skip


def _plain(
    h: Tensor, v: Tensor, mu: Tensor, w1: Tensor, c1: Tensor, w2: Tensor, c2: Tensor, limits: Limits, products: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What `_Dynamics` computes, left to autograd."""
    rows, velocities = _wide(h.flatten(0, -2)), v.flatten(0, -2)
    alpha, beta, gate = gains(h.flatten(0, -2), velocities, w1, c1, w2, c2, limits.beta_max, products)
    pull = alpha * velocities - beta * (rows - mu.clamp(limits.mu_min, limits.mu_max))
    velocity = pull.clamp(-limits.velocity_max, limits.velocity_max)
    out = torch.promote_types(h.dtype, v.dtype)
    return (rows + limits.step * gate * velocity).to(out).view(h.shape), velocity.to(out).view(h.shape)


def products_dtype(like: Tensor) -> torch.dtype:
    """What the controller multiplies in: autocast's type, but fp32 instead of fp16, where a residual stream above 65504 is
    infinite and its gains are NaN. `like` of any shape."""
    dtype = compute_dtype(like)
    return torch.float32 if dtype == torch.float16 else dtype


def dynamics(
    h: Tensor, v: Tensor, mu: Tensor, w1: Tensor, c1: Tensor, w2: Tensor, c2: Tensor, limits: Limits
) -> tuple[Tensor, Tensor]:
    """`dynamics_reference` that keeps only h and v for backward. Products in autocast's type, all else in fp32 (fp64 for fp64),
    h' and v' in the wider of the types of h and v. A compiler recomputes the gains by itself, so that compiled blocks take
    the plain form, in the same types. h, v [..., D], mu [D], w1 [C, 2D], c1 [C], w2 [3D, C], c2 [3D]."""
    products = products_dtype(h if h.dtype == v.dtype else v)
    with without_autocast(h):
        if torch.compiler.is_compiling():
            return _plain(h, v, mu, w1, c1, w2, c2, limits, products)
        return _Dynamics.apply(h, v, mu, w1, c1, w2, c2, limits, products)  # type: ignore[no-untyped-call]
