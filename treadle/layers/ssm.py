"""The state-space student of attention: the same projections, a decaying linear state instead of a growing cache, and a
short softmax window beside it. Decoding memory does not grow with the text.

After Mamba-2 (arXiv 2405.21060), LoLCATs (arXiv 2410.10254: a window beside linear attention) and Hedgehog (arXiv
2402.04347: softmax features).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.layers.attention import Attention, Context
from treadle.layers.rope import rotate
from treadle.layers.state import LayerState, Places
from treadle.ops.ssd import ssd, step
from treadle.ops.window import window_attention


@dataclass
class SSMState(LayerState):
    """memory [B, H, N, P] in fp32; a ring of the last w rotated keys and values [B, G, w + 1, E], the last slot taking
    padding; count [B], real symbols seen."""

    memory: Tensor
    keys: Tensor
    values: Tensor
    count: Tensor


class SSMMixer(Attention):
    """y = g SSD(features of q and k, v) + (1 - g) softmax window, per head; `window` 0 leaves the state alone."""

    def __init__(
        self, width: int, heads: int, groups: int, head_width: int, *, window: int, features: str, normalizer: bool,
        qk_norm: bool = False, eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, groups, head_width, qk_norm=qk_norm, eps=eps)
        self.window, self.normalizer = window, normalizer
        self.decay = nn.Linear(width, heads)
        self.skip = nn.Parameter(torch.zeros(heads))
        self.gate = nn.Parameter(torch.zeros(heads)) if window else None
        mapped = features == "hedgehog"
        self.query_features = nn.Parameter(torch.empty(heads, head_width, head_width)) if mapped else None
        self.key_features = nn.Parameter(torch.empty(groups, head_width, head_width)) if mapped else None

    @property
    def inner(self) -> int:
        """N, features of a head."""
        return self.head_width * (2 if self.query_features is not None else 1)

    def empty(self, rows: int, device: Any, dtype: Any) -> SSMState:
        width = self.head_width + self.normalizer
        ring = (rows, self.groups, self.window + 1, self.head_width)
        return SSMState(
            torch.zeros(rows, self.heads, self.inner, width, device=device),
            torch.zeros(ring, device=device, dtype=dtype),
            torch.zeros(ring, device=device, dtype=dtype),
            torch.zeros(rows, dtype=torch.int64, device=device),
        )

    def forward(self, x: Tensor, context: Context, cache: SSMState | None = None) -> Tensor:  # type: ignore[override]
        rows, length, _ = x.shape
        q, k = self._split(self.query(x), self.heads), self._split(self.key(x), self.groups)
        v = self._split(self.value(x), self.groups)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        assert context.rotary is not None
        q, k = rotate(q, *context.rotary), rotate(k, *context.rotary)
        with torch.autocast(x.device.type, enabled=False):
            y = self._scan(x, q, k, v, context, cache)
        if self.gate is not None:
            near = self._near(q, k, v, context, cache)
            share = torch.sigmoid(self.gate.float())[:, None, None]
            y = share * y + (1.0 - share) * near.float()
        return self.out(y.to(x.dtype).transpose(1, 2).reshape(rows, length, self.heads * self.head_width))

    def _expanded(self, t: Tensor) -> Tensor:
        repeat = self.heads // self.groups
        return t if repeat == 1 else t.repeat_interleave(repeat, dim=1)

    def _features(self, t: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return t * self.head_width**-0.25  # so that a product of two is scaled like attention's
        z = torch.einsum("bhte,hef->bhtf", t, weight.float())
        return torch.cat([z.softmax(-1), (-z).softmax(-1)], -1)

    def _scan(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context, cache: SSMState | None) -> Tensor:
        """[B, H, T, E] in fp32."""
        log_decay = -F.softplus(F.linear(x.float(), self.decay.weight.float(), self.decay.bias.float()))
        log_decay = log_decay.transpose(1, 2)  # [B, H, T]
        c = self._features(q.float(), self.query_features)
        b = self._expanded(self._features(k.float(), self.key_features))
        v = self._expanded(v.float())
        taken = torch.cat([v, torch.ones_like(v[..., :1])], -1) if self.normalizer else v
        if cache is None:
            y, _ = ssd(taken, log_decay, b, c, context.doc_ids)
        else:
            assert context.places is not None
            real = context.places.real[:, None].float()  # padding: no decay, no input
            log_decay, b = log_decay * real, b * real[..., None]
            if x.shape[1] == 1:
                cache.memory = step(cache.memory, taken[:, :, 0], log_decay[:, :, 0], b[:, :, 0]).detach()
                y = c @ cache.memory
            else:
                y, last = ssd(taken, log_decay, b, c, initial=cache.memory)
                cache.memory = last.detach()
        if self.normalizer:
            y = y[..., :-1] / (y[..., -1:] + 1e-6)
        return y + self.skip.float()[:, None, None] * v

    def _near(self, q: Tensor, k: Tensor, v: Tensor, context: Context, cache: SSMState | None) -> Tensor:
        if cache is None:
            return window_attention(q, self._expanded(k), self._expanded(v), self.window, context.doc_ids)
        assert context.places is not None
        return self._ring(q, k, v, context.places, cache)

    def _ring(self, q: Tensor, k: Tensor, v: Tensor, places: Places, cache: SSMState) -> Tensor:
        """Softmax over the ring and the new places; then the ring takes the newest."""
        w, count = self.window, cache.count[:, None]
        slots = torch.arange(w, device=q.device)
        old = count - 1 - (count - 1 - slots) % w  # [B, w]: the position that a slot holds, negative where it is empty
        new = torch.where(places.real, places.positions, -1)
        held = torch.cat([old, new], 1)[:, None]  # [B, 1, w + T]
        now = places.positions[:, :, None]
        seen = (held >= 0) & (held <= now) & (held > now - w)
        keys, values = (
            self._expanded(torch.cat([ring[:, :, :w].to(t.dtype), t], 2)) for ring, t in ((cache.keys, k), (cache.values, v))
        )
        scores = (q @ keys.transpose(-1, -2)) * self.head_width**-0.5
        share = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min).softmax(-1)
        after = cache.count + places.real.sum(1)
        kept = places.real & (places.positions >= (after - w)[:, None])
        write = torch.where(kept, places.positions % w, w)
        rows = torch.arange(q.shape[0], device=q.device)[:, None]
        for ring, t in ((cache.keys, k), (cache.values, v)):
            taken = t.detach().transpose(1, 2) * kept[:, :, None, None]
            ring.transpose(1, 2)[rows, write] = taken.to(ring.dtype)
        cache.count = after
        return share @ values
