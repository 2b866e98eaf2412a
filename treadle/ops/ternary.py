"""Products of int8 activations with ternary weights, exact in integers (BitNet b1.58, arXiv 2402.17764; MatMul-free LM,
arXiv 2406.02528).

x [..., K] normed, W [N, K]: s = 127 / max|x| a token, q = round(x s) in int8; a = mean|W|, T = round(W / a) in {-1, 0, 1};
y = (q T^T) a / s. Sums of integers below 2^24 are the same in any order, type and blocking, so batch size, padding and
decoding step by step change no bit.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from treadle.ops.first_order import first_order
from treadle.ops.native import library
from treadle.ops.rms_norm import rms_norm_same_dtype

SMALLEST = 1e-5  # of max|x| and mean|W|
SMALL = 1 << 16  # numbers: up to here one call into C costs less than seven operations of torch
TOGETHER = 4  # rows that csrc/ternary.c takes at once
INTEGER_ROWS = 17  # torch._int_mm wants more than 16 rows on a GPU; on a CPU it pays from about there


@register_flop_formula(torch.ops.aten._int_mm)
def _integer_product_flops(a: tuple[int, ...], b: tuple[int, ...], *_: object, **__: object) -> int:
    """torch's counter knows products of floats only."""
    return 2 * a[0] * a[1] * b[1]


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (q int8 [M, K], scale s [M, 1] in x's type); rounding half to even."""
    scale = 127.0 / x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    return (x * scale).round_().clamp_(-128, 127).to(torch.int8), scale


def quantize_weights(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W [N, K] -> (T int8 [N, K] of -1, 0, 1; scale a, a scalar)."""
    scale = weight.abs().mean().clamp_min(SMALLEST)
    return (weight / scale).round_().clamp_(-1, 1).to(torch.int8), scale


def integer_product(q: Tensor, ternary: Tensor) -> Tensor:
    """q int8 [M, K], T int8 [N, K] -> q T^T as fp32 [M, N], exact."""
    m, k = q.shape
    aligned = q.device.type == "cpu" or (k % 8 == 0 and ternary.shape[0] % 8 == 0)
    if m >= INTEGER_ROWS and aligned:
        return torch._int_mm(q, ternary.t()).float()
    return q.float() @ ternary.t().float()


class _TernaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        q, s = quantize_activations(x)
        ternary, a = quantize_weights(weight)
        ctx.save_for_backward(q, s, ternary, a)
        return integer_product(q, ternary) * (a / s)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, s, ternary, a = ctx.saved_tensors
        grad_x = (grad * a) @ ternary.to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = (grad / s).t() @ q.to(grad.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def ternary_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] (normed), weight [N, K] in fp32 -> [..., N]. Gradients go straight through the rounding: dW = dy^T n^,
    dx = dy W^ with n^ = q / s and W^ = a T, none through the scales."""
    return _TernaryLinear.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-untyped-call]


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


def dequantized(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(n^, W^) as tensors whose plain product is the ternary one up to rounding, with the same gradients. x [..., K],
    weight [N, K] -> [..., K], [N, K]."""
    with torch.no_grad():
        flat = x.reshape(-1, x.shape[-1])
        q, s = quantize_activations(flat)
        ternary, a = quantize_weights(weight)
        rounded, matrix = (q.float() / s).view(x.shape), ternary.float() * a
    return _Straight.apply(x, rounded), _Straight.apply(weight, matrix)  # type: ignore[no-untyped-call]


# ---- packed weights, for inference ----


def pack(ternary: Tensor) -> Tensor:
    """T int8 [N, K] of -1, 0, 1 -> uint8 [N, K / 4], 2 bits each (csrc/ternary.c has the order); K padded to fours."""
    spare = -ternary.shape[1] % 4
    planes = (F.pad(ternary, (0, spare)) + 1).to(torch.uint8).unflatten(1, (4, -1))
    return planes[:, 0] | planes[:, 1] << 2 | planes[:, 2] << 4 | planes[:, 3] << 6


def unpack(codes: Tensor, columns: int) -> Tensor:
    """The inverse: uint8 [N, K / 4] -> int8 [N, columns]."""
    planes = torch.cat([(codes >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
    return (planes.to(torch.int8) - 1)[:, :columns]


class Layer(ctypes.Structure):
    """struct layer of csrc/ternary.c."""

    _fields_ = (
        ("codes", ctypes.c_void_p), ("gain", ctypes.c_void_p), ("width", ctypes.c_int64), ("rows", ctypes.c_int64),
        ("quarter", ctypes.c_int64), ("scale", ctypes.c_float),
    )  # fmt: skip


class Setting(ctypes.Structure):
    """struct setting of csrc/ternary.c."""

    _fields_ = (("eps", ctypes.c_double), ("smallest", ctypes.c_double), ("threads", ctypes.c_int))


@functools.cache
def setting(eps: float, threads: int) -> Setting:
    """What the compiled form is told besides tensors: the norm's eps, the smallest scale and the number of threads."""
    return Setting(eps, SMALLEST, threads)


@functools.cache
def native() -> ctypes.CDLL | None:
    """csrc/ternary.c with its signatures: pointers go over as plain numbers, which costs a microsecond less each."""
    made = library("ternary")
    if made is not None:
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
        made.normed_quantized.argtypes = [pointer] * 5 + [size] * 2
        made.rms_normed.argtypes = [pointer, pointer, number, pointer, size, size]
        made.ternary_layer.argtypes = [pointer] * 4 + [size]
        made.recurrent_block.argtypes = [pointer] * 5 + [size]
        made.normed_quantized.restype = made.rms_normed.restype = None
    return made


def rms_norm_rounded_once(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in fp64 and rounded to fp32 once; without gradients. x [..., D],
    weight [D]."""
    plain = type(x) is Tensor and x.device.type == "cpu" and weight.dim() == 1 and x.numel() <= SMALL
    made = native() if plain else None
    if made is None:
        return rms_norm_same_dtype(x.double(), weight, eps).float()
    x, weight, out = x.float().contiguous(), weight.float().contiguous(), torch.empty(x.shape, dtype=torch.float32, device="cpu")
    made.rms_normed(x.data_ptr(), weight.data_ptr(), eps, out.data_ptr(), x.numel() // x.shape[-1], x.shape[-1])
    return out


def done(code: int) -> None:
    """MemoryError for the answer of a compiled function that found none."""
    if code:
        raise MemoryError("no memory for the buffers of a ternary layer")


class PackedLayer:
    """One layer's weights for inference: quantised once, packed in 2 bits, with what the compiled form needs prepared.

    In C the norm, the rounding and the product of a few rows are one call. The norm is computed in fp64 in every form, so a
    row has the same bits alone and among others, compiled or not.
    """

    def __init__(self, ternary: Tensor, scale: Tensor, gain: Tensor, eps: float) -> None:
        """ternary int8 [N, K], its scale, the norm's gain [K] and eps."""
        self.ternary, self.eps = ternary, eps
        with torch.no_grad():
            self.gain = gain.to(torch.float32, copy=True).contiguous()  # gathered weights are gone after the pass
            self.scale = scale + 0 * self.gain.sum()  # NaN where a gain is not finite: a maximum in C passes over NaN
        self.native = native() if ternary.device.type == "cpu" else None
        if self.native is not None:
            rows, width = ternary.shape
            self.codes = pack(F.pad(ternary, (0, 0, 0, -rows % TOGETHER))).contiguous()
            self.shape = Layer(self.codes.data_ptr(), self.gain.data_ptr(), width, rows, self.codes.shape[1], float(self.scale))
            self.at = ctypes.addressof(self.shape)

    def normalize(self, x: Tensor) -> Tensor:
        """RMSNorm(x) gain in fp64: x [..., K] -> [..., K]."""
        return rms_norm_same_dtype(x.double(), self.gain, self.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """x fp32 [M, K], before the norm -> fp32 [M, N]."""
        if self.native is None:
            q, s = quantize_activations(self.normalize(x))
            return integer_product(q, self.ternary) * (self.scale.double() / s).float()
        x = x.contiguous()
        count, width = x.shape
        how = ctypes.addressof(setting(self.eps, torch.get_num_threads()))
        if count < INTEGER_ROWS:
            y = x.new_empty(count, self.shape.rows, dtype=torch.float32)
            done(self.native.ternary_layer(self.at, how, x.data_ptr(), y.data_ptr(), count))
            return y
        q, s = torch.empty(count, width, dtype=torch.int8), torch.empty(count, 1, dtype=torch.float64)
        self.native.normed_quantized(x.data_ptr(), self.gain.data_ptr(), how, q.data_ptr(), s.data_ptr(), count, width)
        return integer_product(q, self.ternary) * (self.scale.double() / s).float()
