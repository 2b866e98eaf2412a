"""The state-space student of attention: the same projections, a decaying linear state instead of a growing cache, and a
short softmax window beside it. Decoding memory does not grow with the text.

After Mamba-2 (arXiv 2405.21060), LoLCATs (arXiv 2410.10254: a window beside linear attention) and Hedgehog (arXiv
2402.04347: softmax features).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.layers.attention import Attention
from treadle.layers.context import Context
from treadle.layers.reproducible import ReproducibleLinear, to_reproducible
from treadle.layers.rope import rotate
from treadle.layers.sliding_window_attention import attend
from treadle.layers.state import SlidingWindowCache, expanded
from treadle.ops.precision import without_autocast
from treadle.ops.sliding_window_attention import sliding_window_flops
from treadle.ops.ssd import ssd, ssd_flops, step


@dataclass
class SSMState(SlidingWindowCache):
    """memory [B, H, N, P] in fp32, beside the ring of the window."""

    memory: Tensor


class SSMMixer(Attention):
    """y = g SSD(features of q and k, v) + (1 - g) softmax window, per head; `window` 0 leaves the state alone. `reproducible`:
    evaluation in fp64 (layers/reproducible.py), for models that round."""

    def __init__(
        self, width: int, heads: int, groups: int, head_width: int, *, window: int, features: str, normalizer: bool,
        qk_norm: bool = False, eps: float = 1e-6, reproducible: bool = False,
    ) -> None:  # fmt: skip
        linear: type[nn.Linear] = ReproducibleLinear if reproducible else nn.Linear
        super().__init__(width, heads, groups, head_width, qk_norm=qk_norm, eps=eps, linear=linear)
        self.window, self.normalizer, self.reproducible = window, normalizer, reproducible
        self.decay = linear(width, heads)
        self.read_in_place = () if reproducible else ("decay",)
        self.skip = nn.Parameter(torch.zeros(heads))
        self.gate = nn.Parameter(torch.zeros(heads)) if window else None
        mapped = features == "hedgehog"
        self.query_features = nn.Parameter(torch.empty(heads, head_width, head_width)) if mapped else None
        self.key_features = nn.Parameter(torch.empty(groups, head_width, head_width)) if mapped else None

    @property
    def inner(self) -> int:
        """N, features of a head."""
        return self.head_width * (2 if self.query_features is not None else 1)

    def new_state(self, rows: int, max_len: int, device: Any, dtype: Any) -> SSMState:
        dtype, wide = (torch.float64, torch.float64) if self.reproducible else (dtype, torch.float32)
        memory = torch.zeros(rows, self.heads, self.inner, self.head_width + self.normalizer, device=device, dtype=wide)
        return SSMState(memory=memory, **SlidingWindowCache.fields(rows, self.groups, self.window, self.head_width, device, dtype))

    def forward(self, x: Tensor, context: Context, cache: SSMState | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; with a cache, x continues the tokens it holds."""
        rows, length, _ = x.shape
        q, k = self._split(self.query(x), self.heads), self._split(self.key(x), self.groups)
        v = self._split(self.value(x), self.groups)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        assert context.rotary is not None
        with without_autocast(x) if self.reproducible else nullcontext():
            if self.reproducible:
                q, k, v = to_reproducible(q), to_reproducible(k), to_reproducible(v)
            q, k = rotate(q, *context.rotary), rotate(k, *context.rotary)
            with without_autocast(x):
                y = self._scan(x, q, k, v, context, cache)
            if self.gate is not None:
                near = attend(q, k, v, context, cache, self.window)
                share = torch.sigmoid(self.gate.to(y.dtype))[:, None, None]
                y = share * y + (1.0 - share) * near.to(y.dtype)
        return self.out(y.to(x.dtype).transpose(1, 2).reshape(rows, length, self.heads * self.head_width))

    def _features(self, t: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return t * self.head_width**-0.25  # so that a product of two is scaled like attention's
        z = torch.einsum("bhte,hef->bhtf", t, weight.to(t.dtype))
        return torch.cat([z.softmax(-1), (-z).softmax(-1)], -1)

    def _scan(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context, cache: SSMState | None) -> Tensor:
        """[B, H, T, E] in fp32 (fp64 stays)."""
        wide = q.dtype if q.dtype == torch.float64 else torch.float32
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        decay = self.decay(x.float()) if self.reproducible else F.linear(x.float(), self.decay.weight.float(), self.decay.bias.float())
        log_decay = -F.softplus(decay.to(wide)).transpose(1, 2)  # [B, H, T]
        c = self._features(q, self.query_features)
        repeat = self.heads // self.groups
        b, v = expanded(self._features(k, self.key_features), repeat), expanded(v, repeat)
        taken = torch.cat([v, torch.ones_like(v[..., :1])], -1) if self.normalizer else v
        if cache is None:
            y, _ = ssd(taken, log_decay, b, c, context.doc_ids)
        else:
            assert context.token_positions is not None
            token_mask = context.token_positions.token_mask[:, None].to(wide)  # padding: no decay, no input
            log_decay, b = log_decay * token_mask, b * token_mask[..., None]
            if x.shape[1] == 1:
                cache.memory = step(cache.memory, taken[:, :, 0], log_decay[:, :, 0], b[:, :, 0]).detach()
                y = c @ cache.memory
            else:
                y, last = ssd(taken, log_decay, b, c, initial=cache.memory)
                cache.memory = last.detach()
        if self.normalizer:
            y = y[..., :-1] / (y[..., -1:] + 1e-6)
        return y + self.skip.to(wide)[:, None, None] * v

    def flops(self, length: int) -> int:
        """Of the products of one row's forward pass."""
        width, heads, groups, e = self.query.in_features, self.heads, self.groups, self.head_width
        products = 2 * width * heads * e + 2 * width * groups * e + width * heads
        features = (heads + groups) * e * e if self.query_features is not None else 0
        window = sliding_window_flops(length, heads, e, self.window) if self.window else 0
        return 2 * length * (products + features) + window + ssd_flops(length, heads, self.inner, e + self.normalizer)

    @staticmethod
    def initial(name: str, parameter: Tensor) -> Tensor | str | None:
        """How the parameters that attention does not have start."""
        if name.endswith("_features"):
            return torch.eye(parameter.shape[-1]).expand(parameter.shape)
        if name.endswith("decay.bias"):  # from a memory of 90 positions to one of 3
            return torch.linspace(-4.5, -1.0, parameter.shape[0])
        return "zeros" if name.endswith(("attention.skip", "attention.gate")) else None
