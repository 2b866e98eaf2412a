"""Writing a checkpoint so that it survives kill -9 and a power cut at any moment.

temporary directory -> files, hashed while they are written -> fsync each -> manifest.json with sizes and checksums, last
-> fsync the directories -> rename -> fsync the parent. A reader therefore sees a whole checkpoint or none.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from treadle.checkpoint.layout import MANIFEST, SCHEMA, checkpoint_name, safe_member
from treadle.checkpoint.tensors import stream_tensors
from treadle.errors import SaveError

WRITE_BYTES = 64 << 20
SPACE_MARGIN = 1.1


def _new_hasher() -> None:
    global _hasher
    _hasher = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="treadle-hash")


_hasher: concurrent.futures.ThreadPoolExecutor
_new_hasher()
os.register_at_fork(after_in_child=_new_hasher)  # threads do not survive a fork; their pool would wait for them


def _write_file(path: str, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Writes and fsyncs one new file; returns (bytes, sha256). Hashing runs beside writing: both release the GIL."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for part in parts:
            view = memoryview(part).cast("B")
            size += view.nbytes
            hashed = _hasher.submit(digest.update, view)
            try:
                while view.nbytes:
                    view = view[os.write(descriptor, view[:WRITE_BYTES]) :]
            finally:
                hashed.result()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size, digest.hexdigest()


def fsync_directory(path: str) -> None:
    """Returns once the names in a folder would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: str) -> None:
    """Deletes a folder with all in it; links are deleted, not followed."""
    # Only os.* calls, like all writing here, so that the power-cut test sees every operation.
    for name in os.listdir(path):
        inner = os.path.join(path, name)
        if os.path.isdir(inner) and not os.path.islink(inner):
            remove_tree(inner)
        else:
            os.unlink(inner)
    os.rmdir(path)


def remove_checkpoint(path: str) -> None:
    """Deletes a directory so that a half-deleted checkpoint never looks like one."""
    trash = os.path.join(os.path.dirname(path), f".trash-{os.path.basename(path)}-{uuid.uuid4().hex[:8]}")
    with contextlib.suppress(OSError):
        os.rename(path, trash)
        remove_tree(trash)


def clean(root: str | Path) -> None:
    """Removes what an interrupted save or deletion left; call it under the run's lock."""
    if os.path.isdir(root):
        for name in os.listdir(root):
            if name.startswith((".tmp-", ".trash-")):
                with contextlib.suppress(OSError):
                    remove_tree(os.path.join(root, name))


def check_space(root: str, size: int) -> None:
    """OSError (disk full) when `size` bytes and a margin do not fit under `root`."""
    need = int(SPACE_MARGIN * size) + (1 << 16)
    free = shutil.disk_usage(root).free
    if free < need:
        raise OSError(errno.ENOSPC, f"{need / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")


def places(root: str, step: int, name: str | None) -> tuple[str, str]:
    """(where a checkpoint will be, the temporary directory it is written in)."""
    final = os.path.join(root, name or checkpoint_name(step))
    return final, os.path.join(root, f".tmp-{os.path.basename(final)}-{uuid.uuid4().hex[:8]}")


@contextlib.contextmanager
def refusals(final: str, temporary: str) -> Iterator[None]:
    """Around everything that writes: nothing half-written stays, and a disk that refuses is a SaveError."""
    root = os.path.dirname(final)
    try:
        os.makedirs(root, exist_ok=True)
        yield
    except BaseException as problem:
        with contextlib.suppress(OSError):
            remove_tree(temporary)
        if not isinstance(problem, OSError):
            raise
        raise SaveError(f"checkpoint {os.path.basename(final)} could not be written to {root}: "
                        f"{problem.strerror or problem}. Earlier checkpoints are intact; free some space or write "
                        "elsewhere with --checkpoint_dir DIR, then run the same command again") from problem  # fmt: skip


def publish(temporary: str, final: str) -> None:
    """The move that makes a whole checkpoint visible."""
    if os.path.isdir(final):  # the same step saved again (a resumed run that saves at once): equal contents
        remove_checkpoint(final)
    os.rename(temporary, final)
    fsync_directory(os.path.dirname(final))


def save(
    root: str | Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    files: dict[str, bytes],
    described: dict[str, Any],
    name: str | None = None,
    beside: Mapping[str, bytes] = MappingProxyType({}),
) -> str:
    """Writes checkpoint `step` under `root` and returns its path once it would survive a power cut.

    tensors: file stem -> tensors by name; files: member name -> contents; described: goes into the manifest; beside: files that
    the manifest does not name, since people edit them.
    Raises SaveError (the previous checkpoints are untouched) when the disk refuses. Tensors of any shapes.
    """
    final, temporary = places(str(root), step, name)
    with refusals(final, temporary):
        check_space(str(root), sum(t.nbytes for group in tensors.values() for t in group.values()))
        os.mkdir(temporary)
        for member, data in beside.items():
            _write_file(os.path.join(temporary, member), [data])
        write_members(temporary, step, tensors, files, described, {})
        publish(temporary, final)
    return final


def write_members(
    folder: str,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    files: dict[str, bytes],
    described: dict[str, Any],
    written: dict[str, dict[str, Any]],
) -> None:
    """Tensors, files and, last, the manifest that names them and what was `written` before (member -> size, checksum).
    Tensors of any shapes."""
    written = dict(written)
    for stem, group in tensors.items():
        size, digest = _write_file(os.path.join(folder, stem + ".safetensors"), stream_tensors(group, {"format": "pt"}))
        written[stem + ".safetensors"] = {"bytes": size, "sha256": digest}
    for member, data in files.items():
        assert safe_member(member), member
        inner = os.path.dirname(os.path.join(folder, member))
        if not os.path.isdir(inner):
            os.mkdir(inner)
        size, digest = _write_file(os.path.join(folder, member), [data])
        written[member] = {"bytes": size, "sha256": digest}
    for inner in {os.path.dirname(member) for member in files} - {""}:
        fsync_directory(os.path.join(folder, inner))
    body = json.dumps({"schema": SCHEMA, "step": step, "files": written, **described}, sort_keys=True, allow_nan=False)
    whole = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body})
    _write_file(os.path.join(folder, MANIFEST), [whole.encode()])
    fsync_directory(folder)
