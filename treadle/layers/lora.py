"""Linear layers whose weights stay as they are, with or without a trained product of low rank beside them.

LoRA (Hu et al. 2021, arXiv 2106.09685): y = x W^T + b + s (x A^T) B^T with A [r, K] and B [N, r]; only A and B are trained,
and B starts at 0, so that training starts at the model as it was. s is alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski
2023, arXiv 2312.03732). A layer changes its class in place and keeps the name of its weight. `weight` of such a layer is
what it multiplies by, W + s B A with gradients, so that code which reads weights instead of calling layers is right as well
(without dropout).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.layers.reproducible import ReproducibleLinear
from treadle.ops.first_order import first_order
from treadle.ops.linear import product
from treadle.ops.packed_linear import quantize
from treadle.ops.precision import compute_dtype, without_autocast
from treadle.ops.sharding import copy_whole, is_sharded

LORA_A, LORA_B = "lora_A", "lora_B"
PLAIN = (nn.Linear, ReproducibleLinear)  # classes that compute x W^T + b and nothing else
BASE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.rpartition(".")[2] in (LORA_A, LORA_B)


def start_of(name: str, parameter: Tensor) -> float | str | None:
    """How a parameter of an adapter starts, as Model.initial says it; None for others. A has the deviation that PEFT's
    uniform numbers have, 1 / sqrt(3 K). lora_A [r, K], lora_B [N, r]."""
    last = name.rpartition(".")[2]
    if last == LORA_B:
        return "zeros"
    return float(3 * parameter.shape[1]) ** -0.5 if last == LORA_A else None


def widened(codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W [N, K] of what is held for it."""
    return codes.to(dtype) if scales is None else (codes.float() * scales[:, None]).to(dtype)


class FrozenLinear(nn.Linear):
    """x W^T + b with a W that is not trained, held in fp32, bf16 or int8 (a scale for each output, ops/packed_linear.py); no
    copy of it in another format outlives a product."""

    reproducible: bool  # without gradients in fp64, as layers/reproducible.py

    @classmethod
    def take(cls, layer: nn.Linear, kind: str) -> FrozenLinear:
        """The layer itself, of this class from now on."""
        held, device = layer.weight, layer.weight.device
        reproducible = isinstance(layer, ReproducibleLinear)
        layer.__class__ = cls
        assert isinstance(layer, FrozenLinear)
        layer.reproducible = reproducible
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        made = nn.Parameter(torch.empty(held.shape, dtype=BASE_DTYPES[kind], device=device), requires_grad=False)
        layer._parameters["weight"] = held.requires_grad_(False) if kind == "fp32" else made  # type: ignore[assignment]
        # By the weight's name and not among a checkpoint's tensors: a file has the weight whole.
        layer.register_buffer("scales", torch.empty(held.shape[0], device=device) if kind == "int8" else None, persistent=False)
        if kind != "fp32" and not held.is_meta:
            layer.hold(held)
        return layer

    @property
    def held(self) -> Tensor:
        """W as it is held: fp32, bf16 or int8 [N, K]."""
        found = self._parameters["weight"]
        assert found is not None
        return found

    @torch.no_grad()
    def hold(self, weight: Tensor) -> None:
        """Takes a W [N, K] in fp32, of which this process may hold a part of the rows."""
        if self.scales is None:
            copy_whole(self.held, weight)
            return
        made = quantize(weight, "int8")
        assert made.scales is not None
        copy_whole(self.held, made.codes)
        self.scales.copy_(made.scales)  # type: ignore[operator]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """What the layer multiplies by; between passes, where it is in shards, the part as it is held. [N, K]."""
        return self.held if is_sharded(self.held) else self.effective_weight()

    def effective_weight(self) -> Tensor:
        """W [N, K] as the layer multiplies by it, in fp32, the adapter added where there is one."""
        return self.base_weight()

    def base_weight(self) -> Tensor:
        """W in fp32. [N, K]."""
        return widened(self.held, self.scales, torch.float32)  # type: ignore[arg-type]

    def factors(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor] | None:
        """(the adapter's input where it is not x itself, A, s B), where there is an adapter. x [..., K], A [r, K], s B
        [N, r]."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's type, or autocast's where that is on."""
        if self.reproducible and not torch.is_grad_enabled():
            with without_autocast(x):
                return F.linear(x.double(), self.weight.double(), self.bias.double() if self.bias is not None else None).float()
        factors = self.factors(x)
        if torch.compiler.is_compiling() or self.reproducible:
            kind = x.dtype if self.reproducible else compute_dtype(x)
            y = F.linear(x.to(kind), widened(self.held, self.scales, kind), self.bias.to(kind) if self.bias is not None else None)  # type: ignore[arg-type]
            if factors is None:
                return y
            own, a, b = factors
            return y + F.linear(F.linear((x if own is None else own).to(kind), a.to(kind)), b.to(kind)).to(y.dtype)
        return _Product.apply(x, self.held, self.scales, self.bias, *(factors or (None, None, None)))  # type: ignore[no-untyped-call]


class AdaptedLinear(FrozenLinear):
    """The same with an adapter: lora_A [r, K] and lora_B [N, r], in fp32."""

    scale: float
    dropout: float
    off = False  # while the model computes as the base does

    def adapt(self, rank: int, scale: float, dropout: float) -> None:
        """Adds A and B; their values come from the model (Model.materialise), or from a file."""
        self.scale, self.dropout = scale, dropout
        self.lora_A = nn.Parameter(torch.zeros(rank, self.in_features, device=self.held.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=self.held.device))

    def factors(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor] | None:
        if self.off:
            return None
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout > 0 else None
        return dropped, self.lora_A, self.lora_B * self.scale

    def effective_weight(self) -> Tensor:
        """W + s B A [N, K] in fp32; W alone while the adapter is off."""
        return self.base_weight() if self.off else self.base_weight() + self.scale * (self.lora_B @ self.lora_A)

    def extra_repr(self) -> str:
        """The sizes and the rank, for print(model)."""
        return f"{super().extra_repr()}, rank={self.lora_A.shape[0]}"


class _Product(torch.autograd.Function):
    """x W^T + b + (z A^T) B^T, z = x where it is None. Kept for the gradients: x (z), z A^T, and W as it is held."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, held: Tensor, scales: Tensor | None, bias: Tensor | None, z: Tensor | None, a: Tensor | None, b: Tensor | None
    ) -> Tensor:
        dtype = compute_dtype(x)
        ctx.types, ctx.shape, ctx.compute = (x.dtype, z.dtype if z is not None else x.dtype), x.shape, dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        given = flat if z is None else z.reshape(-1, x.shape[-1]).to(dtype)
        with without_autocast(x):
            y, low = product(flat, widened(held, scales, dtype)), None
            if a is not None and b is not None:
                low = given @ a.to(dtype).t()
                y = y.addmm_(low, b.to(dtype).t())
            if bias is not None:
                y += bias.to(dtype)
        ctx.has_own = z is not None
        ctx.save_for_backward(held, scales, given if a is not None else None, a, b, low)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        held, scales, given, a, b, low = ctx.saved_tensors
        slope = grad.reshape(-1, grad.shape[-1]).to(ctx.compute)
        grad_x = product(slope, widened(held, scales, ctx.compute).t()) if ctx.needs_input_grad[0] else None
        grad_bias = slope.float().sum(0) if ctx.needs_input_grad[3] else None
        grad_z = grad_a = grad_b = None
        if a is not None:
            inner = slope @ b.to(ctx.compute)
            grad_a, grad_b = (inner.t() @ given).to(a.dtype), (slope.t() @ low).to(b.dtype)
            if ctx.has_own:
                grad_z = (inner @ a.to(ctx.compute)).view(ctx.shape).to(ctx.types[1]) if ctx.needs_input_grad[4] else None
            elif grad_x is not None:
                grad_x = grad_x.addmm_(inner, a.to(ctx.compute))
        grad_x = grad_x.view(ctx.shape).to(ctx.types[0]) if grad_x is not None else None
        return grad_x, None, None, grad_bias, grad_z, grad_a, grad_b
