"""Each position takes a share of the one before it in its document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.layers.state import LayerState, TokenPositions

GATE_FEATURES = 32  # of x, that the gate reads


@dataclass
class PreviousPosition(LayerState):
    """x of each row's last token, [B, D]."""

    x: Tensor


class TokenShift(nn.Module):
    """x_t + sigmoid(w . x_t[:32]) x_(t-1), nothing being before the first token of a document.

    One position of looking back before attention, as the token shift of RWKV (Peng et al. 2023, arXiv 2305.13048) has it and
    the smeared keys of Olsson et al. 2022 (arXiv 2209.11895), which lets a single layer form induction heads. w starts at 0.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.gate = nn.Linear(min(GATE_FEATURES, width), 1, bias=False)

    def forward(self, x: Tensor, position_ids: Tensor, positions: TokenPositions | None, state: PreviousPosition | None) -> Tensor:
        """x [B, T, D], position_ids [B, T]: 0 where a document begins. With a state, padding changes nothing in it."""
        if state is None or positions is None:
            before = F.pad(x[:, :-1], (0, 0, 1, 0))
        else:
            before = self._go_on(x, positions, state)
        return self.add(x, before, position_ids)

    def add(self, x: Tensor, before: Tensor, position_ids: Tensor) -> Tensor:
        """x and `before`, which came before it, [..., D]; position_ids [...]."""
        share = self.gate(x[..., : self.gate.in_features]).sigmoid() * (position_ids > 0)[..., None]
        return x + share.to(x.dtype) * before

    @staticmethod
    def _go_on(x: Tensor, positions: TokenPositions, state: PreviousPosition) -> Tensor:
        """The token before each position, wherever padding lies; the state takes the last."""
        rows, length, width = x.shape
        index = torch.arange(1, length + 1, device=x.device)  # 0 is the state's
        last = torch.where(positions.token_mask, index, 0).cummax(1).values
        known = torch.cat([state.x[:, None].to(x.dtype), x.detach()], 1)
        state.x = known.gather(1, last[:, -1:, None].expand(rows, 1, width))[:, 0].to(state.x.dtype)
        return known.gather(1, F.pad(last[:, :-1], (1, 0))[..., None].expand(rows, length, width))

    def new_state(self, rows: int, device: Any, dtype: Any) -> PreviousPosition:
        """Nothing before the first token of each of `rows` rows: zeros [B, width]."""
        return PreviousPosition(torch.zeros(rows, self.width, device=device, dtype=dtype))
