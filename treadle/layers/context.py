"""What all blocks of one forward pass share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from treadle.layers.state import TokenPositions
from treadle.ops.documents import Segments


@dataclass
class Context:
    """Made once by the model; blocks read it."""

    doc_ids: Tensor | None = None  # [B, T], -1 for padding
    segments: Segments | None = None
    rotary: tuple[Tensor, Tensor] | None = None  # cos, sin [B, 1, T, E / 2]
    local_rotary: tuple[Tensor, Tensor] | None = None  # the same of sliding windows, where it differs
    token_positions: TokenPositions | None = None  # with a decoding state
    used: int = 0
    token_mixer_only: bool = False  # a block answers with its mixer alone, for matching it in distillation
    input_ids: Tensor | None = None  # int64 [B, T], where blocks have vectors of the tokens' own
    previous: Any = None  # with a decoding state: what a token shift of the embeddings keeps
    routed: list[Any] | None = None  # what routers decide is kept here when somebody looks
    steered: list[Any] | None = None  # and what dynamics do
    document_ends: Tensor | None = None  # int32 [N + 1], on a GPU: ops/document_attention.py
