"""A ternary layer with its norm, as it trains: one function in compiled passes (csrc/ternary_training.c) around the products.

The reference is `ternary_linear(rms_norm_same_dtype(x, gain, eps), weight)` of ops/ternary.py, which runs wherever the kernels do
not. The forward product is exact in integers either way. In backward T and q are exact in any type; the incoming gradient is
rounded to autocast's type, as that of any matrix product is under autocast.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from treadle.ops.first_order import first_order
from treadle.ops.kernel_inputs import address, kernels, usable
from treadle.ops.linear import product
from treadle.ops.native import library
from treadle.ops.precision import compute_dtype, without_autocast
from treadle.ops.rms_norm import rms_norm_same_dtype
from treadle.ops.ternary import INTEGER_ROWS, SMALLEST, integer_product, ternary_linear

FLOATS = (torch.float32, torch.bfloat16)


@functools.cache
def _made() -> Any:
    made = library("ternary_training")
    if made is not None:
        made.ternary_weights.restype = ctypes.c_float
    return made


def _done(code: int | float) -> None:
    if code == -1:
        raise MemoryError("no memory for the buffers of a ternary layer")


def _half(t: Tensor) -> int:
    return int(t.dtype == torch.bfloat16)


def _sizes(t: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64, int]:
    return ctypes.c_int64(t.shape[0]), ctypes.c_int64(t.shape[1]), torch.get_num_threads()


class _NormedTernaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, weight: Tensor, eps: float, products: torch.dtype) -> Tensor:
        x, gain, weight = x.contiguous(), gain.contiguous(), weight.contiguous()
        (count, width), made = x.shape, kernels(_made(), x)
        q, unit, inverse = x.new_empty(count, width, dtype=torch.int8), gain.new_empty(count), gain.new_empty(count)
        _done(made.ternary_quantize(
            address(x), _half(x), address(gain), ctypes.c_double(eps), ctypes.c_float(SMALLEST), address(q), address(unit), address(inverse),
            *_sizes(x),
        ))  # fmt: skip
        ternary = weight.new_empty(weight.shape, dtype=torch.int8)
        a = made.ternary_weights(address(weight), ctypes.c_float(SMALLEST), address(ternary), ctypes.c_int64(weight.numel()),
                                 torch.get_num_threads())  # fmt: skip
        _done(a)
        ctx.save_for_backward(x, gain, q, unit, inverse, ternary)
        ctx.scale, ctx.products = a, products
        if count < INTEGER_ROWS:  # the same bits: a row does not depend on how many there are
            return integer_product(q, ternary) * (unit * a)[:, None]
        sums = torch._int_mm(q, ternary.t())
        made.ternary_scale(address(sums), ctypes.c_float(a), address(unit), *_sizes(sums))
        return sums.view(torch.float32)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, q, unit, inverse, ternary = ctx.saved_tensors
        made, half = kernels(_made(), x), int(ctx.products == torch.bfloat16)
        grad = grad.to(ctx.products)
        grad_x = grad_gain = grad_weight = None
        if ctx.needs_input_grad[2]:
            values = q.new_empty(q.shape, dtype=ctx.products)
            made.ternary_values(address(q), address(unit), half, address(values), *_sizes(q))
            grad_weight = (grad.t() @ values).float()
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            values = ternary.new_empty(ternary.shape, dtype=ctx.products)
            made.ternary_values(address(ternary), None, half, address(values), *_sizes(ternary))
            slope = product(grad, values.t())
            grad_x, grad_gain = torch.empty_like(x), torch.empty_like(gain)
            _done(made.ternary_norm_gradient(
                address(slope), half, ctypes.c_float(ctx.scale), address(x), _half(x), address(gain), address(inverse), address(grad_x),
                address(grad_gain), *_sizes(x),
            ))  # fmt: skip
        return grad_x, grad_gain, grad_weight, None, None


def normed_ternary_linear(x: Tensor, gain: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., K], gain [K], weight [N, K] in fp32 -> [..., N] in fp32: y = ternary(W) int8(x / rms(x) gain)."""
    products = compute_dtype(x) if compute_dtype(x) in FLOATS else torch.float32
    with without_autocast(x):
        flat = x.reshape(-1, x.shape[-1])
        fits = flat.shape[0] > 0 and x.dtype in FLOATS and gain.dtype == weight.dtype == torch.float32
        if not fits or not usable(x, gain, weight) or _made() is None:
            return ternary_linear(rms_norm_same_dtype(x.float(), gain, eps), weight)
        y = _NormedTernaryLinear.apply(flat, gain, weight, eps, products)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], weight.shape[0])
