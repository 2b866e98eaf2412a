"""Causal attention of packed rows on a GPU: torch's flash kernel over documents one after another, so that what no query may see is
not computed. A dense mask, the other exact way there, computes all of a row.

Used after it has agreed, forward and backward, with the masked reference on a small input of the same device and type in this
process; otherwise a warning says so once, and the mask goes on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from treadle.ops.documents import Segments
from treadle.ops.kernel_trial import agreed

LARGEST_WIDTH = 256  # of a head, in the kernel
BOUND = 2e-2  # relative error of 16-bit attention over 80 positions; a wrong border is off by .1 and more


def document_ends(segments: Segments | None, device: torch.device) -> Tensor | None:
    """Where documents (and runs of padding) end in the rows one after another: int32 [N + 1], from 0, on the device; None where the
    kernel does not run or nobody on the host knows the documents."""
    if segments is None or device.type != "cuda" or not agrees(str(device)):
        return None
    return _ends(segments, device)


def _ends(segments: Segments, device: torch.device) -> Tensor:
    lengths = torch.tensor([0, *(abs(run) for row in segments for run in row)], dtype=torch.int32)
    ends = lengths.cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
    torch._dynamo.maybe_mark_dynamic(ends, 0)  # another count of documents is no other program
    return ends


def takes(q: Tensor) -> bool:
    """Whether the kernel takes queries of this type and width. q [B, H, T, E]."""
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= LARGEST_WIDTH


def document_attention(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, window: int | None = None) -> Tensor:
    """q [B, H, T, E], k and v [B, G, T, E], ends int32 [N + 1] as above -> [B, H, T, E]. window: position t sees t - window + 1 .. t
    of its document. What padding sees is undefined, and finite."""
    rows, _, length, _ = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B T, heads, E]
    sides = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    out = torch.ops.aten._flash_attention_forward(q, k, v, ends, ends, length, length, 0.0, True, False, **sides)[0]
    return out.unflatten(0, (rows, length)).transpose(1, 2)


@functools.cache
def agrees(device: str) -> bool:
    """Whether the kernel is there and gives the reference's values and gradients, with grouped heads and with a window."""
    return agreed("torch's flash kernel for packed documents", "the reference", BOUND, lambda: _pairs(torch.device(device)))


def _pairs(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, heads, 80, 32, generator=generator).to(device, torch.bfloat16) for heads in (4, 2, 2)]
    documents = torch.tensor([[0] * 50 + [1] * 30, [0] * 3 + [1] * 77], device=device)
    ends, place = _ends(((50, 30), (3, 77)), device), torch.arange(80, device=device)
    for window in (None, 7):
        near = (place[:, None] >= place) & (place[:, None] < place + (window or 80))
        visible = near & (documents[:, :, None] == documents[:, None, :])
        found = []
        for fast in (True, False):
            q, k, v = (t.clone().requires_grad_() for t in given)
            with torch.autocast(device.type, enabled=False):
                if fast:
                    y = document_attention(q, k, v, ends, window)
                else:
                    y = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=visible[:, None])
            found.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), (q, k, v))])
        yield from zip(*found)
