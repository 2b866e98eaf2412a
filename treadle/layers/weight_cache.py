"""Modules that cache for evaluation what they compute from their weights alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class ModuleWithWeightCache(nn.Module):
    """The cached value is computed anew when the weights change (their versions and addresses tell), when training goes on
    after an evaluation, and after every training pass: fused optimisers and processes that share weights write them without
    a trace. (So does code that writes `parameter.data`.)"""

    _weight_cache: tuple[Any, Any] | None = None

    def cached(self, key: Any, make: Callable[[], T]) -> T:
        """The value computed under this key, else what `make` computes now; `key` identifies a version of the weights."""
        if self._weight_cache is None or self._weight_cache[0] != key:
            self._weight_cache = (key, make())
        made: T = self._weight_cache[1]
        return made

    def clear_weight_cache(self) -> None:
        """Called in every training pass."""
        if self._weight_cache is not None:
            self._weight_cache = None

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train; going on with training forgets what was cached."""
        if mode:
            self.clear_weight_cache()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weight_cache": None}  # a copy has weights of its own


def weight_version(t: Tensor) -> int:
    """Counts in-place writes; -1 for inference tensors (weights gathered from shards), which do not count. t of any
    shape."""
    return -1 if t.is_inference() else t._version
