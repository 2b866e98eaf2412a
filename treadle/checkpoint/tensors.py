"""safetensors files, written as a stream and parsed with every field checked. No pickle is ever read or written.

The format (github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header with dtype, shape and
offsets of each tensor, then the bytes. Writing here streams tensor by tensor, so a save needs no second copy of the
state; reading hashes and parses the same buffer, so what was verified is what is used.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treadle.errors import CheckpointError, InputError

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
LONGEST_HEADER = 100 << 20


def stream_tensors(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """A safetensors file in parts, tensors in the order of their names. Of any shapes."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, offset + tensor.nbytes]}  # fmt: skip
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in sorted(tensors):
        if tensors[name].numel():
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().data


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A plain safetensors file (checkpoints go through checkpoint/writer.py, which makes them durable). Of any shapes."""
    with path.open("wb") as stream:
        for part in stream_tensors(tensors, metadata):
            stream.write(part)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; InputError when there is none, CheckpointError when it is damaged. Of any
    shapes."""
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    return parse_tensors(np.fromfile(path, dtype=np.uint8), path.name)


def parse_tensors(data: np.ndarray, name: str) -> dict[str, Tensor]:
    """uint8 [N] -> tensors; whatever the bytes hold, the only error is CheckpointError and nothing large is allocated."""
    try:
        if len(data) < 8:
            raise ValueError("shorter than its header")
        (length,) = struct.unpack("<Q", data[:8].tobytes())
        if length > min(len(data) - 8, LONGEST_HEADER):
            raise ValueError("the header is longer than the file")
        header = json.loads(data[8 : 8 + length].tobytes())
        if not isinstance(header, dict):
            raise ValueError("the header is no table")
        body = data[8 + length :]
        return _parse_body(header, body)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError, RuntimeError) as problem:
        raise CheckpointError(f"{name} is not a sound safetensors file ({problem})") from None


def _parse_body(header: dict[str, Any], body: np.ndarray) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, dtype, shape, start, stop in _entries(header, len(body)):
        # A copy: the slice may be unaligned for its type, and the buffer of the whole file must not stay alive.
        part = torch.from_numpy(body[start:stop].copy())
        tensors[name] = part.view(dtype).reshape(shape) if stop > start else torch.empty(shape, dtype=dtype)
    return tensors


def _entries(header: dict[str, Any], size: int) -> Iterator[tuple[str, torch.dtype, list[int], int, int]]:
    """Name, type, shape and place of each tensor, in order; ValueError and its like unless they fill `size` bytes exactly."""
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    entries.sort(key=lambda item: (item[1]["data_offsets"][0], item[1]["data_offsets"][1]))
    position = 0
    for name, entry in entries:
        dtype, shape = BY_NAME[entry["dtype"]], entry["shape"]
        start, stop = entry["data_offsets"]
        if not all(type(n) is int and 0 <= n < 2**48 for n in (*shape, start, stop)):
            raise ValueError(f"{name}: shape or offsets")
        if start != position or stop - start != math.prod(shape) * dtype.itemsize or stop > size:
            raise ValueError(f"{name}: offsets do not fit")
        position = stop
        yield name, dtype, shape, start, stop
    if position != size:
        raise ValueError("bytes are left over")


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in a safetensors file, to be read in parts."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte of the file

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last), or these numbers of a vector; InputError when the file cannot be read. CheckpointError
        when it has become shorter."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.start + first * row)
                data = np.fromfile(stream, dtype=np.uint8, count=(last - first) * row)
        except OSError as problem:
            raise InputError(f"{self.path} cannot be read: {problem}") from None
        if len(data) != (last - first) * row:
            raise CheckpointError(f"{self.path} became shorter while it was read")
        return torch.from_numpy(data).view(self.dtype).reshape(last - first, *self.shape[1:])


def tensor_places(path: Path) -> dict[str, TensorPlace]:
    """The tensors of a safetensors file, unread; CheckpointError when its header is not sound. InputError when it
    cannot be read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, LONGEST_HEADER):
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("the header is no table")
        body = 8 + length
        return {name: TensorPlace(path, dtype, tuple(shape), body + start)
                for name, dtype, shape, start, _ in _entries(header, size - body)}  # fmt: skip
    except OSError as problem:
        raise InputError(f"{path} cannot be read: {problem}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError, struct.error) as problem:
        raise CheckpointError(f"{path} is not a sound safetensors file ({problem})") from None


def parse_offsets(data: np.ndarray, name: str) -> dict[str, list[int]]:
    """Where each tensor of a sharded file lies in its whole, from the metadata torch.distributed.checkpoint writes.
    CheckpointError when it is not sound."""
    try:
        (length,) = struct.unpack("<Q", data[:8].tobytes())
        metadata = json.loads(data[8 : 8 + min(length, LONGEST_HEADER)].tobytes()).get("__metadata__", {})
        table = json.loads(metadata.get("DCP_SHARDING_INFO", "{}"))
        offsets = {str(key): entry["saved_offsets"] for key, entry in table.items()}
        if not all(isinstance(o, list) and all(type(n) is int and 0 <= n < 2**48 for n in o) for o in offsets.values()):
            raise ValueError("offsets")
        return offsets
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as problem:
        raise CheckpointError(f"{name} is not a sound sharded safetensors file ({problem})") from None


def joined(pieces: list[tuple[list[int], Tensor]], name: str) -> Tensor:
    """Parts with their offsets as one tensor; CheckpointError unless they fill it exactly. Of any shapes."""
    kinds = {(tensor.dim(), tensor.dtype, len(offsets)) for offsets, tensor in pieces}
    if len(kinds) != 1 or any(len(offsets) != tensor.dim() for offsets, tensor in pieces):
        raise CheckpointError(f"{name}: its parts do not belong together")
    dims = range(pieces[0][1].dim())
    shape = [max(offsets[d] + tensor.shape[d] for offsets, tensor in pieces) for d in dims]
    if math.prod(shape) != sum(tensor.numel() for _, tensor in pieces):
        raise CheckpointError(f"{name}: its parts do not fill {shape}; a part is missing or there twice")
    if len(pieces) == 1:
        return pieces[0][1]
    whole = torch.empty(shape, dtype=pieces[0][1].dtype)
    filled = torch.zeros(shape[:1], dtype=torch.int64)
    for offsets, tensor in pieces:
        whole[tuple(slice(o, o + n) for o, n in zip(offsets, tensor.shape))] = tensor
        filled[offsets[0] : offsets[0] + tensor.shape[0]] += math.prod(tensor.shape[1:])
    if not bool((filled == math.prod(shape[1:])).all()):
        raise CheckpointError(f"{name}: its parts overlap")
    return whole
