"""One decoding step of a whole dense transformer in one compiled call (csrc/decoding.c).

Layer by layer in torch, a step of 14M parameters is some hundred and fifty operations, which cost more around them than in
them once the weights are small. Here each is a loop over one token's numbers, in fp32, and a token has the same bits alone,
among other rows, and among other tokens of its row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treadle.ops.packed_linear import Matrix, PackedMatrix, native

LANES = 16  # widths are multiples of it


class _Layer(ctypes.Structure):
    """struct layer of csrc/decoding.c."""

    _fields_ = (
        *((name, Matrix) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
    )  # fmt: skip


class _Decoder(ctypes.Structure):
    """struct decoder of csrc/decoding.c."""

    _fields_ = (
        ("layers", ctypes.c_void_p), ("head", Matrix),
        *((name, ctypes.c_void_p) for name in ("embedding", "norm", "cosines", "sines")),
        *((name, ctypes.c_int64) for name in ("count", "width", "inner", "heads", "groups", "head_width", "turned", "slots")),
        ("eps", ctypes.c_float), ("scale", ctypes.c_float),
    )  # fmt: skip


@dataclass
class DenseLayer:
    """What one block computes with. qkv: rows of queries, keys, values; gate_up: of gates, then ups; norms' gains [D], and
    [E] of each head's query and key where those are normalised."""

    qkv: PackedMatrix
    out: PackedMatrix
    gate_up: PackedMatrix
    down: PackedMatrix
    attention_norm: Tensor
    mlp_norm: Tensor
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


class DenseStep:
    """Embedding -> blocks of RMSNorm, rotary attention over a cache, SwiGLU -> norm -> head; only where `native()`."""

    def __init__(
        self, layers: Sequence[DenseLayer], head: PackedMatrix, embedding: Tensor, norm: Tensor, *, heads: int, groups: int,
        head_width: int, eps: float, scale: float,
    ) -> None:  # fmt: skip
        self.vocabulary, self.width = head.shape[0], embedding.shape[1]
        self.embedding, self.norm = (t.detach().float().contiguous() for t in (embedding, norm))
        gains = [[None if t is None else t.detach().float().contiguous()
                  for t in (la.attention_norm, la.mlp_norm, la.query_norm, la.key_norm)] for la in layers]  # fmt: skip
        self._kept = (list(layers), head, gains)
        made = (_Layer * len(layers))(*(
            _Layer(*(m.struct for m in (la.qkv, la.out, la.gate_up, la.down)), *(t.data_ptr() if t is not None else None for t in four))
            for la, four in zip(layers, gains)
        ))  # fmt: skip
        self._layers = made
        inner = layers[0].down.shape[1]
        self._struct = _Decoder(ctypes.addressof(made), head.struct, self.embedding.data_ptr(), self.norm.data_ptr(), None, None,
                                len(layers), self.width, inner, heads, groups, head_width, 0, 0, eps, scale)  # fmt: skip
        self._call = native().decoding_step  # type: ignore[union-attr]

    def __call__(
        self, angles: tuple[Tensor, Tensor], keys: Caches, values: Caches, ids: Tensor, rows: Tensor, positions: Tensor,
        logits: bool = True, prompt: bool = False, x: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """angles: cosines and sines [places, turned / 2] of all positions; ids, rows, positions int64 [count]: tokens, the
        row of the caches that each belongs to, and its position there; a row's tokens in order. Writes their keys and values; ->
        hidden [count, D] after the last norm, logits [count, V]. prompt: they follow one another in one row; the outcome is that
        of the last one alone, [1, ...], sooner, with other last bits. x fp32 [count, D]: what the first block reads, where that is
        more than the tokens' embeddings."""
        cosines, sines = (t.float().contiguous() for t in angles)
        own = _Decoder.from_buffer_copy(self._struct)  # of this call: other threads may be in theirs
        own.cosines, own.sines, own.turned, own.slots = cosines.data_ptr(), sines.data_ptr(), 2 * cosines.shape[1], keys.slots
        count = ids.shape[0]
        if x is not None:  # a table of its own, one row a token
            own.embedding, ids = x.data_ptr(), torch.arange(count)
        kept = 1 if prompt else count
        hidden = self.norm.new_empty(kept, self.width)
        out = self.norm.new_empty(kept, self.vocabulary) if logits else None
        failed = self._call(
            ctypes.addressof(own), keys.at, values.at, ids.data_ptr(), rows.data_ptr(), positions.data_ptr(), count, int(prompt),
            hidden.data_ptr(), out.data_ptr() if out is not None else None, torch.get_num_threads(),
        )  # fmt: skip
        _check(failed)
        return hidden, out


def prompt_attention(q: Tensor, keys: Tensor, values: Tensor, start: int, scale: float) -> Tensor:
    """q [T, H, E] of positions start.. over a row's keys and values [G, slots, E], which hold those positions too -> [T, H E]."""
    count, heads, width = q.shape
    groups, slots, _ = keys.shape
    y = q.new_empty(count, heads * width)
    _check(native().prompt_attention(  # type: ignore[union-attr]
        q.data_ptr(), q.stride(0), keys.data_ptr(), values.data_ptr(), slots, start, count, heads, groups, width, scale,
        y.data_ptr(), heads * width, torch.get_num_threads(),
    ))  # fmt: skip
    return y


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the buffers of a decoding step")


class Caches:
    """The layers' keys, or values, [B, G, slots, E] in fp32 each, as the compiled call takes them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors, self.slots = list(tensors), tensors[0].shape[2]
        self._pointers = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
        self.at = ctypes.addressof(self._pointers)
