"""WHAT IS READ. The names a hand-written loop needs, loaded on first use: a section's help needs neither numpy nor torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from treadle.data.base import Dataset, create_dataloader
    from treadle.data.batch import collate

__all__ = ["Dataset", "collate", "create_dataloader"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(name)
    import importlib

    return getattr(importlib.import_module("treadle.data.batch" if name == "collate" else "treadle.data.base"), name)
