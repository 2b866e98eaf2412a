"""Several residual streams with a router before each half of a block: hyper-connections (Zhu et al. 2025, arXiv
2409.19606) whose stream mixing is bounded (mHC, arXiv 2512.24880) or exactly orthogonal (Cayley).

X [B, T, n, D]; per token: read u = pre . X, compute y = f(u), write X <- H X + post (x) y.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.ops import rotations, stream_kernels
from treadle.ops.streams import read, rms_norm_linear, write

Routing = Literal["cayley_lie", "cayley_mixture", "sinkhorn", "birkhoff", "none"]
GAIN = 0.01  # the part of a router's answer that depends on the token starts this small
CLOSED = -8.0  # logit of what starts unused in a doubly stochastic mixture


@dataclass
class Routed:
    """What one router decided: pre, post [N, n]; mixing [N, n, n]; shares [N, k] of a mixture."""

    pre: Tensor
    post: Tensor
    mixing: Tensor
    shares: Tensor | None = None
    rank: Tensor | None = None  # [N], streams in use


@dataclass
class Reading:
    """What one half of a block works on, and where its answer goes."""

    u: Tensor  # [B, T, D]
    shape: torch.Size  # of the streams
    routed: stream_kernels.Read | None = None  # by the compiled kernels
    held: Tensor | None = None  # otherwise: H X [N, n, D]
    post: Tensor | None = None  # [N, n]

    def write(self, y: Tensor) -> Tensor:
        """y [B, T, D] -> the streams after it [B, T, n, D]."""
        with torch.autocast(y.device.type, enabled=False):
            y = y.reshape(-1, self.shape[-1])
            if self.routed is not None:
                return stream_kernels.write_streams(self.routed, y).view(self.shape)
            assert self.held is not None and self.post is not None
            return write(self.held, self.post, y.to(self.held.dtype)).view(self.shape)


class Router(nn.Module):
    """Reads the streams for one half of a block and prepares its write. Always fp32: what it decides is applied to the
    residual path at every depth."""

    def __init__(
        self, width: int, streams: int, routing: Routing = "cayley_lie", components: int = 2,
        source: Literal["streams", "mean"] = "streams", adaptive_rank: bool = False, noise: float = 1.0, eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.streams, self.routing, self.source, self.adaptive_rank = streams, routing, source, adaptive_rank
        self.noise, self.eps = noise, eps
        mixed = {"cayley_lie": components, "cayley_mixture": components, "sinkhorn": streams**2,
                 "birkhoff": math.factorial(streams), "none": 0}[routing]  # fmt: skip
        self.sizes = [streams, streams, mixed, streams if adaptive_rank else 0]
        if routing != "none":
            self.weight = nn.Parameter(torch.empty(sum(self.sizes), width * (streams if source == "streams" else 1)))
            self.bias = nn.Parameter(torch.zeros(sum(self.sizes)))
            self.gain = nn.Parameter(torch.full((3,), GAIN))
        if routing.startswith("cayley"):
            self.generators = nn.Parameter(torch.empty(components, rotations.generator_count(streams)))

    def flops(self, width: int) -> int:
        """Multiply-adds times 2 of one token, as counted."""
        n, k = self.streams, self.sizes[2]
        if self.routing == "none":
            return 0
        lie = k * rotations.generator_count(n) + (4**3 if n == 4 else 0)  # other sizes solve a system, which is not counted
        inside = {"cayley_lie": lie, "cayley_mixture": k * n * n, "sinkhorn": 0, "birkhoff": k * n * n}
        return 2 * (self.weight.numel() + (n + 1) * n * width + inside[self.routing])

    def forward(self, x: Tensor, record: list[Routed] | None = None) -> Reading:
        """X [B, T, n, D] -> what to work on, and how to write."""
        rows, length, n, width = x.shape
        if self.routing == "none":
            return Reading(x.mean(2), x.shape, None, x.flatten(0, 1), x.new_ones(rows * length, n))
        with torch.autocast(x.device.type, enabled=False):
            flat = x.float().reshape(rows * length, n, width)
            if record is None and self._kernels_fit(flat):
                routed = stream_kernels.read_streams(flat, *self._prepared(), self.eps, self.source == "mean")
                return Reading(routed.u.view(rows, length, width), x.shape, routed)
            decided = self.route(flat)
            if record is not None:
                record.append(decided)
            u, held = read(flat, decided.pre, decided.mixing)
        return Reading(u.view(rows, length, width), x.shape, None, held, decided.post)

    def _kernels_fit(self, x: Tensor) -> bool:
        lie = self.routing == "cayley_lie" and self.streams != 4  # other sizes solve a system
        return not lie and not self.adaptive_rank and stream_kernels.available(x, self.weight, sum(self.sizes))

    def _prepared(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, stream_kernels.Kind]:
        """Weight, bias with the constants of `route` in it, gain, table and kind, as the kernels take them."""
        n, device = self.streams, self.bias.device
        closed = torch.zeros(self.sizes[2], device=device)
        table, kind = None, "mixture"
        if self.routing == "cayley_lie":
            table, kind = self.generators.float(), "lie"
        elif self.routing == "cayley_mixture":
            table = rotations.cayley_reference(self.generators.float(), n).flatten(1)
        elif self.routing == "sinkhorn":
            kind, closed = "sinkhorn", (CLOSED * (1.0 - torch.eye(n, device=device))).flatten()
        else:
            table = rotations.permutations(n, device)
            closed[1:] += CLOSED
        start = torch.cat([torch.full((n,), -math.log(n - 1), device=device), torch.zeros(n, device=device), closed])
        return self.weight.float(), self.bias.float() + start, self.gain.float(), table, kind  # type: ignore[return-value]

    def route(self, x: Tensor) -> Routed:
        """X [N, n, D] in fp32 -> what to do with each token."""
        n = self.streams
        seen = x.flatten(1) if self.source == "streams" else x.mean(1)
        z = rms_norm_linear(seen, self.weight.float(), self.eps)
        z_pre, z_post, z_mix, z_rank = z.split(self.sizes, -1)
        b_pre, b_post, b_mix, b_rank = self.bias.float().split(self.sizes)
        a_pre, a_post, a_mix = self.gain.float().unbind()
        pre = torch.sigmoid(a_pre * z_pre + b_pre - math.log(n - 1))  # starts at 1 / n: the streams' mean
        post = 2.0 * torch.sigmoid(a_post * z_post + b_post)  # starts at 1: the plain residual
        mixing, shares = self._mixing(a_mix * z_mix + b_mix)
        if not self.adaptive_rank:
            return Routed(pre, post, mixing, shares)
        used, rank = _rank(a_mix * z_rank + b_rank, self.noise if self.training else 0.0)
        return Routed(pre * used, post * used, mixing, shares, rank)

    def _mixing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        n = self.streams
        if self.routing == "cayley_lie":  # mixed in the Lie algebra: orthogonal for every token
            shares = logits.softmax(-1)
            return rotations.cayley(shares @ self.generators.float(), n), shares
        if self.routing == "cayley_mixture":
            shares = logits.softmax(-1)
            turns = rotations.cayley_reference(self.generators.float(), n).flatten(1)  # a few matrices only
            return (shares @ turns).unflatten(-1, (n, n)), shares
        if self.routing == "sinkhorn":
            table = logits.unflatten(-1, (n, n)) + CLOSED * (1.0 - torch.eye(n, device=logits.device))
            return rotations.sinkhorn_lean(table), logits.softmax(-1)
        opened = logits.clone()
        opened[..., 1:] += CLOSED
        return rotations.birkhoff(opened, n), opened.softmax(-1)


def _rank(logits: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Logits [N, n] over ranks 1..n -> (staircase mask [N, n], streams in use [N]); straight through (Jang et al. 2017,
    arXiv 1611.01144): the hard choice forward, the soft one's gradient. Without Gumbel noise the likeliest."""
    n = logits.shape[-1]
    noisy = logits
    if noise > 0:
        noisy = logits - noise * torch.log(-torch.log(torch.rand_like(logits).clamp(1e-10, 1.0 - 1e-7)))
    soft = noisy.softmax(-1)
    hard = F.one_hot(noisy.argmax(-1), n).to(soft.dtype)
    choice = hard + soft - soft.detach()
    mask = choice.flip(-1).cumsum(-1).flip(-1)  # m_j = sum of choice_i for i >= j
    return mask, (choice * torch.arange(1, n + 1, device=logits.device)).sum(-1)


def statistics(routed: list[Routed]) -> list[dict[str, float]]:
    """What each router (in order) did, averaged over its tokens; spectral norms are the extreme ones of any token."""
    found = []
    for one in routed:
        sigma = torch.linalg.svdvals(one.mixing)
        row = {"sigma_max": float(sigma[..., 0].max()), "sigma_min": float(sigma[..., -1].min()),
               "pre_norm": float(one.pre.norm(dim=-1).mean()), "post_norm": float(one.post.norm(dim=-1).mean())}  # fmt: skip
        if one.shares is not None:
            entropy = -(one.shares * one.shares.clamp_min(1e-20).log()).sum(-1).mean()
            row.update(max_share=float(one.shares.amax(-1).mean()), entropy=float(entropy),
                       effective_components=float(entropy.exp()))  # fmt: skip
        if one.rank is not None:
            row["rank"] = float(one.rank.mean())
        found.append(row)
    return found


def composite(routed: list[Routed]) -> tuple[float, float]:
    """(largest, smallest) singular value over tokens of the product of all mixings: what the residual path does to a
    signal over the whole depth, in fp64."""
    whole = torch.eye(routed[0].mixing.shape[-1], dtype=torch.float64, device=routed[0].mixing.device)
    for one in routed:
        whole = one.mixing.double() @ whole
    sigma = torch.linalg.svdvals(whole)
    return float(sigma[..., 0].max()), float(sigma[..., -1].min())
