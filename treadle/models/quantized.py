"""A run's weights quantised once and kept beside it, for the next time they are read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from treadle.checkpoint.tensors import read_tensors, stream_tensors, write_tensors
from treadle.errors import CheckpointError, InputError
from treadle.generation.reading import checked, quantized, remember, remembered
from treadle.layers.quantized_files import from_tensors, to_tensors
from treadle.models.huggingface.peft import PeftFolder
from treadle.models.huggingface.reading import ForeignModel
from treadle.models.pretrained import Loaded, home_of
from treadle.ops.packed_linear import Quantized

FOLDER = "quantized"
KEPT = ("int8", "int4")  # bf16 is made as fast as it is read
VERSION = 2  # of how weights are quantised and kept
CHECKSUM = "sha256"  # a tensor of the file: the checksum of the others, with their names, types and shapes


def quantize_once(loaded: Loaded, weights: str | None) -> str:
    """The format that a run is read in: the one that is asked for, of a quantised export its own, else fp32. Its int8 or int4
    weights come from RUN/quantized where they were made before from the same checkpoint, and are written there otherwise."""
    model, checkpoint = loaded.model, loaded.checkpoint
    stored = remembered(model)
    wanted = checked(weights) if weights is not None else stored or "fp32"
    if wanted not in KEPT or wanted == stored:
        return wanted
    layers = None
    path = None if isinstance(checkpoint, (ForeignModel, PeftFolder)) else _place(checkpoint.folder, wanted, checkpoint.manifest)
    shapes = {name: tuple(module.weight.shape) for name, module in model.named_modules() if hasattr(module, "in_features")}
    if path is not None and path.is_file():
        with contextlib.suppress(CheckpointError, InputError):
            layers = from_tensors(_sound(read_tensors(path), path), shapes)
            layers = {name: _moved(matrix, model.device) for name, matrix in layers.items()}
    if layers is None:
        layers = quantized(model, wanted)
        if path is not None:
            with contextlib.suppress(OSError):  # a folder that cannot be written is read all the same
                _write(path, wanted, layers)
    remember(model, layers, wanted)
    return wanted


def _checksum(tensors: dict[str, Tensor]) -> Tensor:
    digest = hashlib.sha256()
    for part in stream_tensors(tensors):
        digest.update(part)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _sound(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """What a file of `_write` holds beside its checksum; CheckpointError where that is another one."""
    kept = tensors.pop(CHECKSUM, None)
    if kept is None or not torch.equal(kept, _checksum(tensors)):
        raise CheckpointError(f"{path}: its checksum differs")
    return tensors


def _moved(matrix: Quantized, device: object) -> Quantized:
    scales = matrix.scales
    return Quantized(matrix.kind, matrix.codes.to(device), scales.to(device) if scales is not None else None)  # type: ignore[call-overload]


def _place(checkpoint: Path, weights: str, manifest: dict[str, object]) -> Path:
    """By the checksums of the checkpoint's weights."""
    described = json.dumps([VERSION, manifest.get("files")], sort_keys=True)
    return home_of(checkpoint) / FOLDER / f"{weights}-{hashlib.sha256(described.encode()).hexdigest()[:16]}.safetensors"


def _write(path: Path, weights: str, layers: dict[str, Quantized]) -> None:
    """Whole or not at all; those of another checkpoint go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        tensors = to_tensors(layers)
        write_tensors(temporary, {**tensors, CHECKSUM: _checksum(tensors)}, {"format": "pt"})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for other in path.parent.glob(f"{weights}-*.safetensors"):
        if other != path:
            other.unlink(missing_ok=True)
