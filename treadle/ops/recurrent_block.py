"""One position of a whole ternary recurrent block in one compiled call: what makes decoding byte by byte fast on a CPU.

The same operations in the same types as layers/hgrn.py, so the same bits; there each of some thirty operations costs more
around it than in it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from treadle.ops.ternary import Layer, PackedLayer, done, native, setting


class Block(ctypes.Structure):
    """struct block of csrc/ternary.c."""

    _fields_ = (
        *((name, Layer) for name in ("forget", "input", "gate", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("norm", "mlp_norm", "inner_norm", "bound")),
        ("eps", ctypes.c_double), ("heads", ctypes.c_int64), ("norm_of_hidden", ctypes.c_int32),
    )  # fmt: skip


class PackedBlock:
    """A block's weights as the compiled call takes them; only where `available()`."""

    def __init__(
        self, layers: Sequence[PackedLayer], norm: Tensor, mlp_norm: Tensor, inner_norm: Tensor, bound: Tensor | None, *,
        eps: float, heads: int, norm_of_hidden: bool,
    ) -> None:  # fmt: skip
        """layers: forget, input, output gate, out, gate and up, down."""
        self.eps = layers[0].eps
        with torch.no_grad():  # copies: gathered weights are gone after the pass
            given = (norm, mlp_norm, inner_norm, bound)
            vectors = [v.to(torch.float32, copy=True).contiguous() if v is not None else None for v in given]
        self._kept = (layers, vectors)  # what the pointers point at
        pointers = (v.data_ptr() if v is not None else None for v in vectors)
        self._shape = Block(*(layer.shape for layer in layers), *pointers, eps, heads, int(norm_of_hidden))
        self._at = ctypes.addressof(self._shape)
        self._step = native().recurrent_block  # type: ignore[union-attr]

    def __call__(self, x: Tensor, hidden: Tensor, token_mask: Tensor) -> Tensor:
        """x [B, 1, D], hidden [B, Di] (updated in place), token_mask [B, 1] -> [B, 1, D]; other rows stay as they are."""
        y = x.clone(memory_format=torch.contiguous_format)
        how = ctypes.addressof(setting(self.eps, torch.get_num_threads()))
        token_mask = token_mask.contiguous()
        done(self._step(self._at, how, y.data_ptr(), hidden.data_ptr(), token_mask.data_ptr(), y.shape[0]))
        return y


def available() -> bool:
    """Whether the compiled call can be made on this machine."""
    return native() is not None
