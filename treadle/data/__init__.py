"""WHAT IS READ. The names a hand-written loop needs; torch is imported only when a batch is made."""

from treadle.data.base import Dataset, create_dataloader

__all__ = ["Dataset", "collate", "create_dataloader"]


def __getattr__(name: str) -> object:
    if name == "collate":
        from treadle.data.batch import collate

        return collate
    raise AttributeError(name)
