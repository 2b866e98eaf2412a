"""The gated linear recurrent unit with its short convolution (HGRN, arXiv 2311.04823; its ternary form, MatMul-free LM,
arXiv 2406.02528)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from treadle.layers.bitlinear import BitLinear
from treadle.layers.context import Context
from treadle.layers.reproducible import (
    ReproducibleLinear,
    reproducible_rms_norm,
    reproducible_sigmoid,
    reproducible_silu,
)
from treadle.layers.state import LayerState
from treadle.ops.documents import document_starts
from treadle.ops.gates import gated_norm, gated_product, gated_scan
from treadle.ops.precision import without_autocast
from treadle.ops.scan import Backend, scan
from treadle.ops.short_convolution import short_convolution


def linear(width: int, out: int, ternary: bool, reproducible: bool = False) -> BitLinear | nn.Linear:
    """`reproducible`: of a full-precision layer in a model that also rounds (layers/reproducible.py)."""
    if ternary:
        return BitLinear(width, out)
    return (ReproducibleLinear if reproducible else nn.Linear)(width, out, bias=False)


@dataclass
class RecurrentState(LayerState):
    """hidden [B, Di] in fp32; the last inputs of the short convolutions [B, size - 1, channels], oldest first."""

    hidden: Tensor
    convolved: Tensor


class ShortConvolution(nn.Module):
    """y_t = sum_k w_k x_{t-k} for each channel over the last `size` positions of a document."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(channels, size))

    def forward(self, x: Tensor, context: Context, before: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x [B, T, C] and, with a state, the inputs before it -> (y, the inputs to keep)."""
        if before is None:
            return self._sum(x, context.doc_ids), None
        assert context.token_positions is not None
        token_mask = context.token_positions.token_mask
        # Padding has no position: the tokens' inputs move to the front, are convolved there, and move back.
        order = (~token_mask).to(torch.int8).argsort(dim=1, stable=True)
        index = order[..., None].expand_as(x)
        whole = torch.cat([before.to(x.dtype), x.gather(1, index)], 1)
        summed = self._sum(whole, None)[:, self.size - 1 :]  # fp32 where x has come in 16 bits
        y = torch.zeros_like(summed).scatter(1, index, summed)
        last = token_mask.sum(1)[:, None] + torch.arange(self.size - 1, device=x.device)
        kept = whole.gather(1, last[..., None].expand(-1, -1, x.shape[2]))
        return y, kept.detach().to(before.dtype)

    def _sum(self, x: Tensor, doc_ids: Tensor | None) -> Tensor:
        return short_convolution(x, self.weight, doc_ids)


class HGRN(nn.Module):
    """f = sigmoid(F x), i = silu(I x) (1 - f), h_t = f_t h_{t-1} + i_t, y = O o(h, G x)."""

    def __init__(
        self, width: int, inner: int, *, heads: int = 1, ternary: bool = True, gate: Literal["matmulfree", "hgrn"] = "matmulfree",
        convolution: int = 0, shared_convolution: bool = False, eps: float = 1e-6, backend: Backend = "auto", reproducible: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.inner, self.heads, self.gate, self.eps, self.backend = inner, heads, gate, eps, backend
        self.forget, self.input = linear(width, inner, ternary, reproducible), linear(width, inner, ternary, reproducible)
        self.output_gate, self.out = linear(width, inner, ternary, reproducible), linear(inner, width, ternary, reproducible)
        self.norm = nn.Parameter(torch.ones(inner))
        self.shared = shared_convolution
        channels = width if shared_convolution else 2 * inner
        self.convolution = ShortConvolution(channels, convolution) if convolution else None

    def new_state(self, rows: int, max_len: int, device: Any, dtype: Any) -> RecurrentState:
        """The empty state of `rows` sequences: h [B, D'] in fp32, and the inputs that the short convolution looks back at."""
        channels, size = self.convolution.weight.shape if self.convolution is not None else (0, 1)
        past = torch.zeros(rows, size - 1, channels, device=device, dtype=dtype)
        return RecurrentState(torch.zeros(rows, self.inner, device=device), past)

    def forward(self, x: Tensor, context: Context, state: RecurrentState | None = None, bound: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; bound [Di]: what the gate is at least."""
        seen = x
        if self.convolution is not None and self.shared:
            seen = reproducible_silu(self._convolve(x, context, state))
        forget, value = self.forget(seen), self.input(seen)
        if self.convolution is not None and not self.shared:
            forget, value = self._convolve(torch.cat([forget, value], -1), context, state).chunk(2, -1)
        gate = self.output_gate(x)
        if torch.is_grad_enabled() and state is None and self.backend == "auto":
            return self.out(self._trained(forget, value, gate, bound, context, x))
        with without_autocast(x):
            f = reproducible_sigmoid(forget.float())
            if bound is not None:
                f = bound + (1.0 - bound) * f
            i = reproducible_silu(value.float()) * (1.0 - f)
            h = self._recur(f, i, context, state)
            gate = gate.float()
            o = self._norm(gate) * reproducible_silu(h) if self.gate == "matmulfree" else self._norm(h) * reproducible_silu(gate)
        return self.out(o.to(x.dtype))

    def _trained(self, forget: Tensor, value: Tensor, gate: Tensor, bound: Tensor | None, context: Context, x: Tensor) -> Tensor:
        """What goes into the last product, by two functions that compute gates where they use them."""
        with without_autocast(x):
            starts = document_starts(context.doc_ids) if context.doc_ids is not None else None
            h, gate = gated_scan(forget.float(), value.float(), bound, starts), gate.float()
            normed, opened = (gate, h) if self.gate == "matmulfree" else (h, gate)
            o = gated_norm(normed, opened, self.norm.float(), self.heads, self.eps)
            return o if isinstance(self.out, BitLinear) else o.to(x.dtype)  # a ternary layer reads fp32

    def flops(self, length: int) -> int:
        """Of the products of one row's forward pass."""
        return 2 * length * 4 * self.forget.in_features * self.inner

    def _recur(self, f: Tensor, i: Tensor, context: Context, state: RecurrentState | None) -> Tensor:
        if state is None:
            if context.doc_ids is not None:  # the first position of a document forgets all before it
                f = f.masked_fill(document_starts(context.doc_ids)[..., None], 0.0)
            return scan(f, i, None, self.backend)
        assert context.token_positions is not None
        token_mask = context.token_positions.token_mask[..., None]
        f, i = torch.where(token_mask, f, 1.0), torch.where(token_mask, i, 0.0)  # padding: h stays
        h = scan(f, i, state.hidden, self.backend)
        state.hidden = h[:, -1].detach().clone()
        return h

    def _convolve(self, x: Tensor, context: Context, state: RecurrentState | None) -> Tensor:
        assert self.convolution is not None
        y, kept = self.convolution(x, context, state.convolved if state is not None else None)
        if state is not None and kept is not None:
            state.convolved = kept
        return y

    def _norm(self, x: Tensor) -> Tensor:
        weight = self.norm.unflatten(0, (self.heads, -1))
        return reproducible_rms_norm(x.unflatten(-1, (self.heads, -1)), weight, self.eps).flatten(-2)


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x) with gate and up in one matrix (so that one norm serves both)."""

    def __init__(self, width: int, inner: int, ternary: bool, reproducible: bool = False) -> None:
        super().__init__()
        self.gate_up = linear(width, 2 * inner, ternary, reproducible)
        self.down = linear(inner, width, ternary, reproducible)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        both = self.gate_up(x)
        if torch.is_grad_enabled() and both.dtype == torch.float32:
            return self.down(gated_product(both))
        gate, up = both.chunk(2, -1)
        return self.down(reproducible_silu(gate) * up)

    def flops(self, length: int) -> int:
        """Of the products of one row's forward pass."""
        return 2 * length * 3 * self.gate_up.in_features * self.down.in_features
