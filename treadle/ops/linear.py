"""y = x W^T of one input with one or several weights, and its gradients, as training on a CPU computes them.

One function for several weights adds the input's gradients inside the products. In fp32 torch multiplies through MKL, which
on AMD's processors reaches 75 to 96 GFLOP/s a core where oneDNN reaches 100 to 108 (Zen 4, 4096 rows, widths 384 to 2048; the
gradient of a weight, whose sum is the long one, is the exception). So there oneDNN is asked; the choice depends on the
machine's make alone, since each library rounds in an order of its own and a resumed run has to round likewise.
"""

from __future__ import annotations

import functools
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from treadle.ops.first_order import first_order
from treadle.ops.fused import are_switched_off
from treadle.ops.planned import gpu_is_planned, runs_on_cpu
from treadle.ops.precision import compute_dtype, without_autocast
from treadle.ops.processor import made_by_amd

ONEDNN_FROM_ROWS = 256  # fewer are decoded or evaluated, where MKL's lower start cost counts


_SCHEMAS = {
    "default": "(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y",
    "binary": "(Tensor X, Tensor other, Tensor W, Tensor? B, str attr) -> Tensor Y",
}


def _onednn() -> Any:
    """torch's name for oneDNN's product of fp32 tensors as they lie; private, so it may be missing."""
    return getattr(getattr(torch.ops, "mkldnn", None), "_linear_pointwise", None)


@functools.cache
def _prefers_onednn() -> bool:
    """Decided without a product of its own, which a counter of operations would see."""
    try:
        if not torch.backends.mkldnn.is_available() or not made_by_amd():
            return False
        return all(str(getattr(_onednn(), name)._schema).endswith(schema) for name, schema in _SCHEMAS.items())
    except AttributeError:
        return False


def _product_flops(x: tuple[int, ...], *_: object, out_shape: tuple[int, ...], **__: object) -> int:
    return 2 * x[0] * x[1] * out_shape[-1]


# torch's counter does not know these.
if _onednn() is not None:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_product_flops)
if torch.ops.aten.addmm_ not in flop_registry:
    register_flop_formula(torch.ops.aten.addmm_, get_raw=True)(flop_registry[torch.ops.aten.addmm])


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    return (type(x) is Tensor and x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
            and x.shape[0] >= ONEDNN_FROM_ROWS and _prefers_onednn() and not are_switched_off())  # fmt: skip


def product(x: Tensor, weight: Tensor, added: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x [N, K], weight [O, K] of any strides -> x weight^T (+ added [N, O] or bias [O], not both) [N, O]; `added` may be
    overwritten."""
    if _takes_onednn(x, weight):
        if added is None:
            return _onednn()(x, weight, bias, "none", [], "")
        return _onednn().binary(x, added, weight, None, "add")
    if bias is not None:
        return torch.addmm(bias, x, weight.t())
    return x @ weight.t() if added is None else added.addmm_(x, weight.t())


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """tensors: `count` weights and as many biases, or none."""
        dtype = compute_dtype(x)
        ctx.types, ctx.input_shape, ctx.count = [t.dtype for t in (x, *tensors)], x.shape, count
        flat, narrow = x.reshape(-1, x.shape[-1]).to(dtype), [t.to(dtype) for t in tensors]
        weights = narrow[:count]
        ctx.save_for_backward(flat, *weights)
        with without_autocast(x):
            return tuple(product(flat, w, bias=b).view(*x.shape[:-1], w.shape[0]) for w, b in zip_longest(weights, narrow[count:]))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, *weights = ctx.saved_tensors
        slopes = [g.reshape(-1, g.shape[-1]) for g in grads]
        of_x, _, *of_tensors = ctx.needs_input_grad
        grad_x, of_weights = linears_backward(flat, weights, slopes, (of_x, *of_tensors[: ctx.count]))
        if grad_x is not None:
            grad_x = grad_x.view(ctx.input_shape).to(ctx.types[0])
        of_biases = [slope.sum(0) if want else None for slope, want in zip(slopes, of_tensors[ctx.count :])]
        return grad_x, None, *(g if g is None else g.to(kind) for g, kind in zip((*of_weights, *of_biases), ctx.types[1:]))


def linears_backward(
    x: Tensor, weights: list[Tensor], slopes: list[Tensor], wanted: tuple[bool, ...]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """x [N, K], weights [O, K], gradients [N, O] of their products -> the gradients of x and of each weight, where wanted."""
    grad_x = None
    for weight, slope in zip(weights, slopes) if wanted[0] else ():
        grad_x = product(slope, weight.t(), grad_x)
    return grad_x, [slope.t() @ x if want else None for slope, want in zip(slopes, wanted[1:])]


def is_short(x: Tensor) -> bool:
    """Whether what is computed once, for a few rows, is over before a function with gradients has begun. x [..., K]."""
    return not torch.is_grad_enabled() and x.numel() < ONEDNN_FROM_ROWS * x.shape[-1]


def linears(x: Tensor, *weights: Tensor, biases: list[Tensor] | None = None) -> tuple[Tensor, ...]:
    """x [..., K], weights [O_i, K], biases [O_i], one for each or none -> x W_i^T + b_i [..., O_i], in autocast's type where that is
    on. torch's own would convert x to that type once for each weight, and keep every copy."""
    if is_short(x) or not runs_on_cpu(x, *weights):
        return tuple(F.linear(x, w, b) for w, b in zip_longest(weights, biases or ()))
    return _Linears.apply(x, len(weights), *weights, *(biases or ()))  # type: ignore[no-untyped-call]


def takes_one_product(x: Tensor) -> bool:
    """Whether several products of x are better one: training on a GPU, where narrow products leave most of it idle. x [..., K]."""
    return torch.is_grad_enabled() and (x.device.type == "cuda" or gpu_is_planned())


def in_one_product(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, ...]:
    """x [..., K], weights [O_i, K], biases [O_i] or none -> x W_i^T + b_i [..., O_i], views of one product. Of 32768 rows, 768 wide, a
    product of 768 outputs runs at 440 TFLOP/s on an H200 and one of 3072 at 750."""
    whole = F.linear(x, torch.cat(weights), torch.cat(biases) if biases else None)
    return whole.split([weight.shape[0] for weight in weights], -1)
