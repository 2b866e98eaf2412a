"""One-dimensional arrays in files: memory-mapped here, read by ranges where the file is remote."""

from __future__ import annotations

from typing import Any

import numpy as np

from treadle.storage.remote import AnyPath, RemotePath, size_of


class RemoteArray:
    """The numbers in a remote file, read as they are asked for: array[a:b] is one range, np.asarray(array) all of it."""

    def __init__(self, file: RemotePath, dtype: np.dtype) -> None:
        self.file, self.dtype = file, dtype

    def __len__(self) -> int:
        return self.file.state().size // self.dtype.itemsize

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            wide = self.dtype.itemsize
            return np.frombuffer(self.file.read_range(start * wide, stop * wide), self.dtype)[:: step]
        number = range(len(self))[place]
        return self[number : number + 1][0]

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def max(self, **options: Any) -> Any:
        return np.asarray(self).max(**options)


def mapped(file: AnyPath, dtype: np.dtype) -> Any:
    """np.ndarray or RemoteArray [N]."""
    if isinstance(file, RemotePath):
        return RemoteArray(file, dtype)
    return np.memmap(file, dtype=dtype, mode="r") if size_of(file) else np.zeros(0, dtype=dtype)
