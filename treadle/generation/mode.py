"""Evaluation mode while something is written, whoever else writes with the same model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_lock = threading.Lock()


@dataclass
class _Held:
    flags: list[tuple[Any, bool]]  # each module, and whether it was in training mode
    users: int = 0


_held: dict[int, _Held] = {}  # by id of models that are held here now


@contextmanager
def evaluating(model: Any) -> Iterator[bool]:
    """Inside, all of the model's modules are in evaluation mode; gives whether the model was in training mode. When the last of those that
    are inside at one time leaves, each module has its own mode again."""
    with _lock:
        held = _held.get(id(model))
        if held is None:
            held = _held[id(model)] = _Held([(part, part.training) for part in model.modules()])
            if any(flag for _, flag in held.flags):
                model.eval()
        held.users += 1
    try:
        yield held.flags[0][1]
    finally:
        with _lock:
            held.users -= 1
            if not held.users:
                del _held[id(model)]
                _restore(held.flags)


def _restore(flags: list[tuple[Any, bool]]) -> None:
    for part, flag in flags:
        if flag and not part.training:
            part.train()  # and not the flag alone: going on with training forgets what was kept for evaluation
    for part, flag in flags:
        if part.training != flag:
            part.training = flag
