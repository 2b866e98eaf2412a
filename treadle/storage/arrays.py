"""One-dimensional arrays in files: memory-mapped here, read by ranges where the file is remote."""

from __future__ import annotations

from typing import Any

import numpy as np

from treadle.storage.cache import PART_BYTES
from treadle.storage.remote import AnyPath, RemotePath, size_of


class RemoteArray:
    """The numbers in a remote file, read as they are asked for: array[a:b] is one range, np.asarray(array) all of it."""

    def __init__(self, file: RemotePath, dtype: np.dtype) -> None:
        self.file, self.dtype = file, dtype
        self._held = (0, np.zeros(0, dtype))  # the part that was read last: a row's documents lie side by side

    def __len__(self) -> int:
        return self.file.state().size // self.dtype.itemsize

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            return self._range(start, stop)[::step]
        number = range(len(self))[place]
        return self._range(number, number + 1)[0]

    def _range(self, start: int, stop: int) -> np.ndarray:
        begin, held = self._held
        if begin <= start and stop <= begin + len(held):
            return held[start - begin : stop - begin]
        wide = PART_BYTES // self.dtype.itemsize
        if stop - start > wide:
            return self._read(start, stop)
        begin, end = start // wide * wide, -(-stop // wide) * wide
        held = self._read(begin, min(end, len(self)))
        self._held = begin, held
        return held[start - begin : stop - begin]

    def _read(self, start: int, stop: int) -> np.ndarray:
        return np.frombuffer(self.file.read_range(start * self.dtype.itemsize, stop * self.dtype.itemsize), self.dtype)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def max(self, **options: Any) -> Any:
        """As numpy's, of the whole array."""
        return np.asarray(self).max(**options)


def mapped(file: AnyPath, dtype: np.dtype) -> Any:
    """np.ndarray or RemoteArray [N]."""
    if isinstance(file, RemotePath):
        return RemoteArray(file, dtype)
    return np.memmap(file, dtype=dtype, mode="r") if size_of(file) else np.zeros(0, dtype=dtype)
