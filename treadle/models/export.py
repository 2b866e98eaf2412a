"""Export: the weights of a run, whole in one file, with what it takes to use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from treadle.checkpoint import writer
from treadle.checkpoint.layout import MANIFEST
from treadle.checkpoint.reader import Checkpoint
from treadle.errors import CheckpointError, InputError
from treadle.layers import packed_weights
from treadle.models.base import CONFIG_FILE, describe
from treadle.models.pretrained import GENERATION_FILE, generation_defaults, home_of, locate, read_config, read_shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(
    run: str, output: str | None = None, precision: str = "fp32", packed: bool = False, warn: Any = None
) -> Path:
    """Writes config.json, model.safetensors and the tokenizer of a run (or checkpoint) and returns the folder, by default
    RUN/export. Shards are joined. `packed` stores ternary layers in 1.6 bits a weight; with fp32 for the rest, answers stay the
    same bit for bit. The folder is checked like a checkpoint and serves wherever a run is asked for; `from_pretrained` reads it
    too. InputError when the folder is in use for something else, or nothing in it is ternary.
    """
    if precision not in DTYPES:
        raise InputError(f"--precision {precision!r}: use {', '.join(DTYPES)}")
    checkpoint = locate(run, warn)
    config = read_config(checkpoint)
    cls, shape = read_shape(checkpoint, config)
    folder = Path(output) if output is not None else home_of(checkpoint.folder) / "export"
    _refuse_foreign(folder)
    with torch.device("meta"):
        model = cls(shape)  # type: ignore[call-arg]
    weights, quantized = packed_weights.unpack(model, checkpoint.tensors("model"))
    model.refuse_other_weights({n: list(t.shape) for n, t in weights.items()})
    if packed:
        if not packed_weights.ternary_layers(model):
            raise InputError(f"--packed: {run} has no ternary layers to pack; leave it out")
        weights = packed_weights.pack(model, weights)
        for name, (_, scale) in quantized.items():  # of an export that is packed already: the scale as it is
            weights[name + packed_weights.SCALE] = scale
    weights = {n: t if n.endswith(packed_weights.SCALE) or not t.is_floating_point() else t.to(DTYPES[precision]) for n, t in weights.items()}
    members = ["config.toml", *checkpoint.members("tokenizer/")]
    files = {name: checkpoint.raw(name) for name in members}
    files[CONFIG_FILE] = describe(cls, shape).encode()
    told = generation_defaults(checkpoint.folder)
    if told:
        files[GENERATION_FILE] = (json.dumps(told, indent=1) + "\n").encode()
    described = {"weights_only": True, "source": str(checkpoint.folder), "precision": precision, "packed": packed}
    writer.save(folder.parent, checkpoint.step, {"model": weights}, files, described, name=folder.name)
    return folder


def _refuse_foreign(folder: Path) -> None:
    """An export may be replaced; nothing else is."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    if not folder.exists():
        return
    try:
        own = (folder / MANIFEST).is_file() and Checkpoint(folder).manifest.get("weights_only", False)
    except CheckpointError:
        own = False
    if not own:
        raise InputError(f"{folder} exists and is no export; give another folder with --output")
