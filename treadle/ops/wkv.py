"""The recurrence of RWKV-6 (Peng et al. 2024, arXiv 2404.05892, section 4.2): a matrix memory of which each channel of the keys
decays on its own, and a bonus for the present position.

    y_t = r_t . (H_{t-1} + u k_t (x) v_t)
    H_t = exp(lw_t) H_{t-1} + k_t (x) v_t        [N, P] for each head, the decay along N

r and k [B, H, T, N], v [B, H, T, P], log_decay lw [B, H, T, N] <= 0, bonus u [H, N]; everything in fp32 (fp64 stays).
Documents packed into a row are kept apart by `documents` [B, T] (each in one piece).

In chunks, where the weight of position j at i, sum_n r_in k_jn exp(lw_{j+1,n} + .. + lw_{i-1,n}), is no product of one factor of i and
one of j without exponents of either sign, which overflow. A chunk is therefore halved again and again: from the left half of
a block to its right half the exponents up to their border are both <= 0. log2(64) = 6 products of small matrices, each of T
rows at most, instead of a [64, 64, N] tensor a chunk, and no sum of decays is ever a difference of two others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.ops.memories import available, recurrence
from treadle.ops.ssd import CHUNK, chunk_documents, in_chunks, one_by_one


def wkv_reference(
    r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, documents: Tensor | None = None, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One position after the other: (y [B, H, T, P], last state [B, H, N, P])."""
    state = initial if initial is not None else v.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])

    def at(t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        return step(state, r[:, :, t], k[:, :, t], v[:, :, t], log_decay[:, :, t], bonus)

    return one_by_one(at, k.shape[2], state, documents)


def step(state: Tensor, r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor) -> tuple[Tensor, Tensor]:
    """One position: state [B, H, N, P], r, k and log_decay [B, H, N], v [B, H, P] -> (y [B, H, P], the state after it)."""
    y = (r[..., None, :] @ state)[..., 0, :] + (r * bonus * k).sum(-1, keepdim=True) * v
    return y, state * log_decay.exp()[..., None] + k[..., :, None] * v[..., None, :]


def chunk_size(length: int) -> int:
    """Positions in a chunk, a power of two."""
    return min(CHUNK, 1 << (length - 1).bit_length())


def _until(decay: Tensor) -> Tensor:
    """[..., S, N] -> the sum over the positions before each one."""
    return F.pad(decay[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def _after(decay: Tensor) -> Tensor:
    """[..., S, N] -> the sum over the positions after each one."""
    return F.pad(decay[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _left(exponent: Tensor, apart: Tensor | None) -> Tensor:
    """What is left after these decays; nothing where documents are `apart`."""
    return (exponent if apart is None else exponent.masked_fill(apart[..., None], float("-inf"))).exp()


def wkv(
    r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, documents: Tensor | None = None,
    initial: Tensor | None = None, chunk: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same in chunks (a power of two long): (y [B, H, T, P], last state [B, H, N, P])."""
    if chunk is None and available(r, k, v, log_decay, bonus, initial):
        return recurrence("bonus", r, k, v, log_decay, documents, initial, bonus=bonus)
    length, size = k.shape[2], chunk or chunk_size(k.shape[2])
    r, k, v, decay, documents = in_chunks(size, r, k, v, log_decay, documents)  # [B, H, C, Q, ...]
    y = (r * bonus[:, None, None] * k).sum(-1, keepdim=True) * v
    half = size // 2
    while half:
        reader, key, value, lost = (t.unflatten(3, (-1, 2, half)) for t in (r, k, v, decay))  # [B, H, C, blocks, 2, half, ...]
        apart: list[Tensor | None] = [None, None]
        if documents is not None:
            own = documents.unflatten(3, (-1, 2, half))
            border = own[..., 0, -1:]  # the document that reaches over the middle of each block, if any does
            apart = [own[..., 0, :] != border, own[..., 1, :] != border]
        written = key[..., 0, :, :] * _left(_after(lost[..., 0, :, :]), apart[0])
        read = reader[..., 1, :, :] * _left(_until(lost[..., 1, :, :]), apart[1])
        seen = (read @ written.transpose(-1, -2)) @ value[..., 0, :, :]
        y = y + torch.stack([torch.zeros_like(seen), seen], 4).flatten(3, 5)
        half //= 2
    enters, leaves, over = None, None, None
    if documents is not None:
        before, ends = chunk_documents(documents)
        enters, leaves, over = documents != before[..., None], documents != ends[..., None], ends != before
    written = (k * _left(_after(decay), leaves)).transpose(-1, -2) @ v  # [B, H, C, N, P], what each chunk leaves behind
    keep = _left(decay.sum(-2), over)[..., None]
    state = initial.to(v.dtype) if initial is not None else torch.zeros_like(written[:, :, 0])
    entering = []
    for index in range(k.shape[2]):
        entering.append(state)
        state = keep[:, :, index] * state + written[:, :, index]
    y = y + (r * _left(_until(decay), enters)) @ torch.stack(entering, 2)
    return y.flatten(2, 3)[:, :, :length], state


def wkv_flops(length: int, heads: int, inner: int, width: int) -> int:
    """Floating-point operations of the products of one row (inner N, width P)."""
    size = chunk_size(length)
    padded = -(-length // size) * size
    return heads * padded * ((size - 1) * (inner + width) + 4 * inner * width)
