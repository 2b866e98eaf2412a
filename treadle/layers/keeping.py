"""Modules that keep something made of their weights for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class Keeping(nn.Module):
    """What is kept is made anew when the weights change, which their versions and addresses tell, when training goes on after
    an evaluation, and after a pass of training: fused optimisers and processes that share weights write them without a trace.
    (So does who writes `parameter.data`.)"""

    _kept: tuple[Any, Any] | None = None

    def kept(self, mark: Any, make: Callable[[], T]) -> T:
        """What was made when the weights had this mark, else what `make` makes now."""
        if self._kept is None or self._kept[0] != mark:
            self._kept = (mark, make())
        made: T = self._kept[1]
        return made

    def forget(self) -> None:
        """Called in every pass of training."""
        if self._kept is not None:
            self._kept = None

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.forget()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # a copy has weights of its own


def version(t: Tensor) -> int:
    """Counts writes; tensors made for inference (weights gathered from shards) do not say."""
    return -1 if t.is_inference() else t._version
