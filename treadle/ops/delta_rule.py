"""The gated delta rule (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464, eq. 10): a decaying memory in which a key's value is
replaced by a share beta instead of added to.

    H_t = a_t (I - beta_t k_t k_t^T) H_{t-1} + beta_t k_t (x) v_t        [N, P] for each head, a_t = exp(la_t)
    y_t = q_t . H_t

q and k [B, H, T, N] (k of length 1 at most), v [B, H, T, P], log_decay la [B, H, T] <= 0, beta [B, H, T] in [0, 1]; everything in
fp32 (fp64 stays). Documents packed into a row are kept apart by `documents` [B, T] (each in one piece).
"""

from __future__ import annotations

import torch
from torch import Tensor

from treadle.ops.memories import available, recurrence
from treadle.ops.ssd import chunk_decays, chunk_size, in_chunks, one_by_one


def delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, documents: Tensor | None = None, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One position after the other: (y [B, H, T, P], last state [B, H, N, P])."""
    state = initial if initial is not None else v.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])

    def at(t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        state = step(state, k[:, :, t], v[:, :, t], log_decay[:, :, t], beta[:, :, t])
        return torch.einsum("bhn,bhnp->bhp", q[:, :, t], state), state

    return one_by_one(at, k.shape[2], state, documents)


def step(state: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """One position: state [B, H, N, P], k [B, H, N], v [B, H, P], log_decay and beta [B, H] -> the state after it."""
    state = state * log_decay.exp()[..., None, None]
    wrong = v - (k[..., None, :] @ state)[..., 0, :]  # what the memory does not say yet
    return state + (beta[..., None] * k)[..., :, None] * wrong[..., None, :]


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, documents: Tensor | None = None,
    initial: Tensor | None = None, chunk: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same in chunks (the WY form, section 3.3): (y [B, H, T, P], last state [B, H, N, P]).

    With D_ij what is left at i of position j, the values u that a chunk really adds solve a triangular system,
    (I + tril(beta_i D_ij k_i . k_j, -1)) u = beta (v - left k . H_0), whose right side is linear in the state H_0 before the
    chunk: one solve for both parts, then a loop over chunks.
    """
    if chunk is None and available(q, k, v, log_decay, beta, initial):
        return recurrence("delta", q, k, v, log_decay, documents, initial, beta=beta)
    length, size = k.shape[2], chunk or chunk_size(k.shape[2])
    q, k, v, decay, beta, documents = in_chunks(size, q, k, v, log_decay, beta, documents)
    weights, left, right, keep = chunk_decays(decay, documents, precise=True)
    keys = k.transpose(-1, -2)
    mixing = ((beta[..., None] * k) @ keys * weights).tril(-1)
    width = v.shape[-1]
    wanted = beta[..., None] * torch.cat([v, left[..., None] * k], -1)
    # Substitution, not a product of powers: with equal keys those reach 10^18 within 64 positions. Ones on the diagonal.
    solved = torch.linalg.solve_triangular(mixing, wanted, upper=False, unitriangular=True)
    added, read = solved.split([width, k.shape[-1]], -1)  # u = added - read . H_0
    taken = (k * right[..., None]).transpose(-1, -2)
    state = initial.to(v.dtype) if initial is not None else v.new_zeros(*k.shape[:2], k.shape[-1], width)
    keep, entering, values = keep[..., None, None], [], []
    for index in range(k.shape[2]):
        entering.append(state)
        values.append(added[:, :, index] - read[:, :, index] @ state)
        state = keep[:, :, index] * state + taken[:, :, index] @ values[-1]
    y = (q * left[..., None]) @ torch.stack(entering, 2) + (q @ keys * weights) @ torch.stack(values, 2)
    return y.flatten(2, 3)[:, :, :length], state


def delta_rule_flops(length: int, heads: int, inner: int, width: int) -> int:
    """Floating-point operations of the products of one row (inner N, width P). The triangular solve, size / 2 x (N + P)
    multiply-adds a position, is not among them: torch's counter knows none of it."""
    size = chunk_size(length)
    padded = -(-length // size) * size
    return 2 * heads * padded * (2 * size * inner + size * width + 3 * inner * width)
