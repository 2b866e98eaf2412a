"""Reading a checkpoint: every byte that is used was checked against the manifest first."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from treadle.checkpoint.layout import MANIFEST, SCHEMA, checkpoint_name, safe_member, steps_in
from treadle.checkpoint.tensors import joined, parse_offsets, parse_tensors
from treadle.errors import CheckpointError


class Checkpoint:
    """One checkpoint folder. Opening reads the manifest; each member is verified when it is read."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self.step: int = self.manifest["step"]

    def _bytes(self, member: str) -> np.ndarray:
        if member not in self.manifest["files"]:
            raise CheckpointError(f"{self.folder}: the manifest names no {member}")
        want, path = self.manifest["files"][member], self.folder / member
        if not path.is_file() or path.is_symlink() or ("/" in member and path.parent.is_symlink()):
            raise CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != want["bytes"]:
            raise CheckpointError(f"{path} has {size} bytes, the manifest says {want['bytes']}")
        data = np.fromfile(path, dtype=np.uint8)
        if hashlib.sha256(data.data).hexdigest() != want["sha256"]:
            raise CheckpointError(f"{path} is damaged: its checksum differs")
        return data

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """The whole tensors of `stem`.safetensors, or of its shards, verified. Of any shapes."""
        if not self.sharded:
            return parse_tensors(self._bytes(stem + ".safetensors"), f"{self.folder / stem}.safetensors")
        parts: dict[str, list[tuple[list[int], Tensor]]] = {}
        for member in self.members(f"{stem}/"):
            data, place = self._bytes(member), str(self.folder / member)
            offsets = parse_offsets(data, place)
            for name, tensor in parse_tensors(data, place).items():
                parts.setdefault(name, []).append((offsets.get(name, [0] * tensor.dim()), tensor))
        return {name: joined(pieces, f"{self.folder / stem}: {name}") for name, pieces in parts.items()}

    @property
    def sharded(self) -> bool:
        """The tensors are in parts, one file a process."""
        return bool(self.manifest.get("shards"))

    def holds(self, stem: str, name: str) -> bool:
        """Whether a tensor of this name belongs to `stem`: the optimiser's are called parameter|key."""
        return ("|" in name) == (stem == "optimizer")

    def raw(self, member: str) -> bytes:
        """A member's bytes, verified."""
        return self._bytes(member).tobytes()

    def text(self, member: str) -> str:
        """A text member, verified. CheckpointError when it is no text."""
        try:
            return self.raw(member).decode("utf-8")
        except UnicodeDecodeError as problem:
            raise CheckpointError(f"{self.folder / member} is not text: {problem}") from None

    def json(self, member: str) -> dict[str, Any]:
        """A member that holds one table, verified; CheckpointError when it does not."""
        try:
            table = json.loads(self.text(member))
        except (ValueError, RecursionError) as problem:
            raise CheckpointError(f"{self.folder / member} is not JSON: {problem}") from None
        if not isinstance(table, dict):
            raise CheckpointError(f"{self.folder / member} holds no table")
        return table

    def members(self, prefix: str = "") -> list[str]:
        """Names of all members that begin so."""
        return [name for name in self.manifest["files"] if name.startswith(prefix)]

    def verify(self) -> None:
        """Reads and checks every member; CheckpointError names the first that is not as it was written."""
        for member in self.manifest["files"]:
            self._bytes(member)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        outer = json.loads(path.read_bytes())
        body = outer["body"]
        if hashlib.sha256(body.encode()).hexdigest() != outer["sha256"]:
            raise CheckpointError(f"{path} is damaged: its checksum differs")
        manifest = json.loads(body)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise CheckpointError(f"{path} cannot be read ({type(problem).__name__}: {problem})") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        raise CheckpointError(f"{path} has schema {schema!r}, this version of treadle reads {SCHEMA}")
    files = manifest.get("files")
    sound = isinstance(files, dict) and isinstance(manifest.get("step"), int) and all(
        safe_member(name) and isinstance(entry, dict) and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
        for name, entry in files.items()
    )  # fmt: skip
    if not sound:
        raise CheckpointError(f"{path} has a wrong structure or an unsafe member name")
    return manifest


def newest_valid(
    root: str | Path, warn: Callable[[str], None], quarantine: bool = True, before: int | None = None
) -> Checkpoint | None:
    """The newest checkpoint that verifies as a whole; None when there is none.

    A damaged one is reported through `warn` and set aside as damaged-*, never deleted. CheckpointError when every
    checkpoint is damaged: a run never silently starts from scratch.
    """
    damaged: list[str] = []
    for step in steps_in(root):
        if before is not None and step > before:
            continue
        folder = os.path.join(root, checkpoint_name(step))
        try:
            checkpoint = Checkpoint(folder)
            checkpoint.verify()
            return checkpoint
        except (CheckpointError, OSError) as problem:
            damaged.append(f"{checkpoint_name(step)} ({problem})")
            warn(f"checkpoint {checkpoint_name(step)} is damaged: {problem}; trying the one before it")
            if quarantine:
                aside = os.path.join(root, f"damaged-{checkpoint_name(step)}-{uuid.uuid4().hex[:4]}")
                with contextlib.suppress(OSError):
                    os.rename(folder, aside)
    # Ones set aside by an earlier start count too: without them the run would begin again at step 0.
    aside_before = [n for n in os.listdir(root) if n.startswith("damaged-")] if os.path.isdir(root) else []
    if damaged or aside_before:
        names = "; ".join(damaged) or ", ".join(sorted(aside_before))
        raise CheckpointError(f"all checkpoints in {root} are damaged: {names}. They are kept as damaged-*; start anew "
                              "in a new folder with --fresh")  # fmt: skip
    return None
