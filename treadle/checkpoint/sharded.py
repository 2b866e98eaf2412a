"""Checkpoints whose tensors are in parts: written and read by torch.distributed.checkpoint, in the same envelope.

Each process writes its part of `model` and `optimizer` as safetensors files of its own into the temporary directory, and
hashes them; the first process adds the other members and the manifest, last, and renames. The directory has to be one
that all processes see.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from treadle.checkpoint import writer
from treadle.checkpoint.reader import Checkpoint
from treadle.errors import CheckpointError, SaveError

T = TypeVar("T")


class Peers(Protocol):
    """What is needed of the processes that save together."""

    rank: int
    group: Any

    def all_gather_object(self, value: Any) -> list[Any]:
        """The value of each process, in their order."""

    def on_main_first(self, action: Callable[[], T]) -> T:
        """Runs an action in the first process; its result, or error, in all of them."""

    def agree(self, problem: Exception | None) -> None:
        """Raises in all processes where one has a problem."""


def save(
    root: str | Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    files: dict[str, bytes],
    described: dict[str, Any],
    peers: Peers,
    name: str | None = None,
) -> str:
    """`writer.save` by all processes together; SaveError in all of them when one cannot write. Tensors of any shapes."""
    root = str(root)
    need = int(sum(sum(peers.all_gather_object(sum(t.nbytes for t in group.values()))) for group in tensors.values()))

    def begin() -> list[str]:
        final, temporary = writer.places(root, step, name)
        with writer.refusals(final, temporary):
            writer.check_space(root, need)
            os.mkdir(temporary)
        return [final, temporary]

    final, temporary = peers.on_main_first(begin)
    mine: dict[str, dict[str, Any]] = {}
    try:
        for stem, group in tensors.items():
            mine.update(_write_parts(temporary, stem, group, peers, final))
    except Exception:
        if peers.rank == 0:
            with contextlib.suppress(OSError):
                writer.remove_tree(temporary)
        raise
    written = {member: entry for part in peers.all_gather_object(mine) for member, entry in part.items()}

    def finish() -> str:
        with writer.refusals(final, temporary):
            for stem in tensors:
                writer.fsync_directory(os.path.join(temporary, stem))
            writer.write_members(temporary, step, {}, files, {**described, "shards": sorted(tensors)}, written)
            writer.publish(temporary, final)
        return final

    return peers.on_main_first(finish)


def _write_parts(
    temporary: str, stem: str, group: dict[str, Tensor], peers: Peers, final: str
) -> dict[str, dict[str, Any]]:
    """This process's files of `stem`; an error in one process is raised in all before the next exchange."""
    problem: Exception | None = None
    found: dict[str, dict[str, Any]] = {}
    try:
        dcp.save(
            dict(group),
            storage_writer=HuggingFaceStorageWriter(os.path.join(temporary, stem), save_distributed=True),
            process_group=peers.group,
        )
        found = _hashed(temporary, stem, peers.rank)
    except (OSError, dcp.CheckpointException) as raised:
        problem = SaveError(f"checkpoint {os.path.basename(final)} could not be written to {os.path.dirname(final)}: "
                            f"{_reason(raised)}. Earlier checkpoints are intact; free some space or write elsewhere with "
                            "--checkpoint_dir DIR, then run the same command again")  # fmt: skip
    peers.agree(problem)
    return found


def _reason(problem: BaseException) -> str:
    if isinstance(problem, dcp.CheckpointException):
        inner = [failure[0] for failure in problem.failures.values()]
        return str(inner[0]) if inner else str(problem)
    return str(problem)


def _hashed(folder: str, stem: str, rank: int) -> dict[str, dict[str, Any]]:
    """Sizes and checksums of the files this process wrote, by member name."""
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(os.listdir(os.path.join(folder, stem))):
        if name.startswith(f"shard-{rank + 1:05d}-"):
            path = os.path.join(folder, stem, name)
            with open(path, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            found[f"{stem}/{name}"] = {"bytes": os.path.getsize(path), "sha256": digest}
    return found


def shapes(checkpoint: Checkpoint, stem: str) -> dict[str, list[int]]:
    """Names and whole shapes of the tensors of `stem`, sharded or not."""
    found = _reader(checkpoint, stem).read_metadata().state_dict_metadata
    return {name: list(entry.size) for name, entry in found.items() if checkpoint.holds(stem, name)}  # type: ignore[union-attr]


def load_into(checkpoint: Checkpoint, stem: str, targets: dict[str, Tensor], group: Any) -> None:
    """Fills targets (parts or whole tensors) from a verified checkpoint, reading only the bytes each part needs. All
    processes call it. CheckpointError when it cannot be read. Of any shapes."""
    try:
        dcp.load(dict(targets), storage_reader=_reader(checkpoint, stem), process_group=group)
    except (dcp.CheckpointException, OSError, ValueError, RuntimeError, KeyError) as problem:
        text = _reason(problem) if isinstance(problem, dcp.CheckpointException) else str(problem)
        raise CheckpointError(f"{checkpoint.folder}: {stem} cannot be read ({text.splitlines()[0]})") from problem


def _reader(checkpoint: Checkpoint, stem: str) -> HuggingFaceStorageReader:
    inner = checkpoint.folder / stem
    return HuggingFaceStorageReader(str(inner if inner.is_dir() else checkpoint.folder))
