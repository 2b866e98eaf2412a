"""Checkpoints taken from their copies in object storage: verified before anything sees them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from treadle.checkpoint.copies import (
    CHECKPOINTS,
    LOGS,
    RUN_FILE,
    best_file_at,
    holds,
    id_here,
    refuse_another,
    steps_at,
)
from treadle.checkpoint.layout import MANIFEST, checkpoint_name, steps_in
from treadle.checkpoint.reader import Checkpoint
from treadle.checkpoint.retention import BEST_FILE, best_in
from treadle.checkpoint.writer import check_space, clean, publish, refusals, remove_tree
from treadle.errors import CheckpointError, InputError
from treadle.files import alone, write_atomically
from treadle.storage.remote import RemotePath
from treadle.storage.retries import Gone, Unreachable

UNFINISHED = "TAKEN-UP"  # in a run's folder while it is being taken from its copy
UNUSED = 86400.0  # seconds after which a checkpoint that was fetched to be read may be removed for another one of its run

Warn = Callable[[str], None]


def _stage(source: RemotePath, root: Path) -> Checkpoint:
    """One checkpoint in a temporary folder of `root`, verified. CheckpointError for a damaged one, SaveError for a disk that refuses."""
    temporary = root / f".tmp-{source.name}-{uuid.uuid4().hex[:8]}"
    with refusals(str(root / source.name), str(temporary)):
        temporary.mkdir(parents=True)
        try:
            (source / MANIFEST).download(temporary / MANIFEST)
            found = Checkpoint(temporary)  # also looks at the names
            check_space(str(root), sum(entry["bytes"] for entry in found.manifest["files"].values()))
            for member in found.members():
                remote, wanted = source / member, found.manifest["files"][member]["bytes"]
                if (there := remote.size_now()) != wanted:
                    raise CheckpointError(f"{remote} has {there} bytes, the manifest says {wanted}")
                (temporary / member).parent.mkdir(exist_ok=True)
                remote.download(temporary / member)
            found.verify()
        except (CheckpointError, Gone) as problem:  # that a network fails is no damage
            raise CheckpointError(f"{source}: {str(problem).replace(str(temporary), str(source))}") from None
    return found


def fetch_checkpoint(source: RemotePath, root: Path) -> Checkpoint:
    """Brings one checkpoint into `root`, where it is not there yet and whole. Errors: as _stage."""
    final = root / source.name
    if (final / MANIFEST).is_file() and holds(source / MANIFEST, (final / MANIFEST).read_bytes()):
        with contextlib.suppress(CheckpointError):
            found = Checkpoint(final)
            found.verify()
            return found
    publish(str(_stage(source, root).folder), str(final))
    return Checkpoint(final)


def _newest_whole(place: RemotePath, steps: list[int], warn: Warn, fetch: Callable[[RemotePath], Checkpoint]) -> Checkpoint:
    problems: list[str] = []
    for step in steps:
        try:
            return fetch(place / CHECKPOINTS / checkpoint_name(step))
        except CheckpointError as problem:
            problems.append(str(problem))
            warn(f"{problem}; trying the one before it")
    raise CheckpointError(f"all checkpoints of {place} are damaged: {'; '.join(problems)}")


def fetch_newest(place: RemotePath, root: Path, warn: Warn, choice: str = "") -> Checkpoint | None:
    """The newest checkpoint of a copy that verifies (choice: "best" or a step: that one), brought into `root`; None where there is none
    at all. InputError for a choice that is not there."""
    steps = steps_at(place)
    if choice:
        best = best_in(best_file_at(place))
        step = best if choice == "best" else int(choice) if choice.isdigit() else None
        if step not in steps:
            have = ", ".join(map(str, reversed(steps))) or "none"
            raise InputError(f"{place}: no checkpoint {choice!r} (there is: {have}{', and best' if best in steps else ''})")
        return fetch_checkpoint(place / CHECKPOINTS / checkpoint_name(step), root)
    return _newest_whole(place, steps, warn, lambda source: fetch_checkpoint(source, root)) if steps else None


# ---- a run goes on from its copy ----


def take_up(place: RemotePath, run: Path, root: Path, logs: Path, warn: Warn) -> int | None:
    """Where the copy of a run is ahead of what is here (nothing, most often): its newest checkpoint that verifies and the best one in
    `root`, its configuration, tokenizer and logs. Returns the step; None, and nothing is changed, where it is not ahead.

    ConfigError where another run's copy is there; Unreachable where nothing is here to go on from without it (else a warning).
    """
    here, unfinished = steps_in(root), (run / UNFINISHED).exists()
    try:
        mine = id_here(run)
        if here or mine is not None:
            refuse_another(place, mine)
        there = steps_at(place)
        if not there or (here and here[0] >= there[0] and not unfinished):
            return None
        return _take(place, run, root, logs, there, warn)
    except Unreachable as problem:
        if not here or unfinished:
            raise
        warn(f"{problem}; whether the copy is ahead is not known")
        return None


def _take(place: RemotePath, run: Path, root: Path, logs: Path, there: list[int], warn: Warn) -> int:
    """The newest checkpoint is shown last: one that is there has everything else beside it, whenever this is cut off."""
    run.mkdir(parents=True, exist_ok=True)
    (run / UNFINISHED).touch()
    newest = _newest_whole(place, there, warn, lambda source: _stage(source, root))
    mark = best_file_at(place)
    best = best_in(mark)
    if mark is not None and best in there:
        try:
            if best != newest.step:
                fetch_checkpoint(place / CHECKPOINTS / checkpoint_name(best), root)
            write_atomically(root / BEST_FILE, mark)
        except CheckpointError as problem:
            warn(f"the best checkpoint stays where it is: {problem}")
    logs.mkdir(parents=True, exist_ok=True)
    for name, folder in [*((name, logs) for name in LOGS), (RUN_FILE, run)]:
        with contextlib.suppress(Gone):
            write_atomically(folder / name, (place / name).read_now())
    for member in newest.members("tokenizer/"):
        (run / member).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(run / member, newest.raw(member))
    write_atomically(run / "config.toml", newest.raw("config.toml"))
    step = newest.step
    publish(str(newest.folder), str(root / checkpoint_name(step)))
    (run / UNFINISHED).unlink()
    return step


# ---- a copy is read ----


def fetched_run(source: RemotePath, choice: str, cache: Path, warn: Warn) -> Checkpoint:
    """A checkpoint to read from a copy of a run (its newest, or `choice`) or from the URL of one checkpoint, kept in `cache`; others of
    that run that nobody has used for a day are removed. InputError where there is none."""
    root = cache / "runs" / f"{hashlib.sha256(source.url.encode()).hexdigest()[:12]}-{source.name}"[:100] / CHECKPOINTS
    root.mkdir(parents=True, exist_ok=True)
    with alone(root.parent / "lock"):
        clean(root)
        if (source / MANIFEST).is_file():
            if choice:
                raise InputError(f"{source} is one checkpoint, so @{choice} means nothing; leave it out")
            found: Checkpoint | None = fetch_checkpoint(source, root)
        else:
            found = fetch_newest(source, root, warn, choice)
        if found is None:
            raise InputError(f"{source} holds no checkpoint; give the URL of a run's copy (checkpoint.mirror and the run's name)")
        os.utime(found.folder)
        for path in root.iterdir():
            if path != found.folder and time.time() - path.stat().st_mtime > UNUSED:
                remove_tree(str(path))
    return found
