"""A head whose logits are bounded."""

from __future__ import annotations

from torch import Tensor, nn


class SoftcappedHead(nn.Linear):
    """c tanh(x W^T / c): logits between -c and c (Gemma 2, arXiv 2408.00118)."""

    def __init__(self, width: int, vocab_size: int, softcap: float) -> None:
        super().__init__(width, vocab_size, bias=False)
        self.softcap = softcap

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> logits [..., V], between -c and c."""
        return self.softcap * (super().forward(x) / self.softcap).tanh()
