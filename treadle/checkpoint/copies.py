"""Copies of a run's checkpoints in object storage: written when they are whole here, and taken back from there.

URL/RUN/checkpoints/step-00001000/...   as on disk; the manifest is copied last, so a copy without one is none
URL/RUN/checkpoints/best.json           which one is best
URL/RUN/*.jsonl, *.csv                  the logs, as they were at the last copy
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from treadle.checkpoint.layout import MANIFEST, checkpoint_name, parse_step, steps_in
from treadle.checkpoint.reader import Checkpoint
from treadle.checkpoint.retention import BEST_FILE, best_step
from treadle.checkpoint.writer import check_space, clean, publish, refusals, remove_tree
from treadle.errors import CheckpointError, DataError, InputError
from treadle.files import write_atomically
from treadle.storage.remote import RemotePath
from treadle.storage.retries import Gone

LOGS = ("metrics.jsonl", "events.jsonl", "training_log.csv", "eval_log.csv")
CHECKPOINTS = "checkpoints"
RUN_FILE = "run.json"  # written when a run begins
STAGES = "stages"  # the folder of a distillation's stages inside its run


def place_of(url: str, run: Path) -> RemotePath:
    """Where a run is copied to: URL/NAME, for a stage of a distillation URL/NAME/stages/STAGE."""
    parts = run.resolve().parts
    return RemotePath("/".join([url.rstrip("/"), *parts[-3 if run.parent.name == STAGES else -1 :]]))


def steps_at(place: RemotePath) -> list[int]:
    """Steps of the whole checkpoints there, newest first. DataError where it cannot be reached."""
    root = place / CHECKPOINTS
    found = [step for name in root.names() if (step := parse_step(name)) is not None]
    return sorted((step for step in found if (root / checkpoint_name(step) / MANIFEST).is_file()), reverse=True)


# ---------------------------------------------------------------------------------------------------------------------
# there


def copy_there(place: RemotePath, root: Path, logs: Path, step: int, keep: int) -> None:
    """Copies one checkpoint of `root`, the best one where that is not there yet, and the logs; then removes there what rotation would.

    Raises FileNotFoundError when the checkpoint is removed here meanwhile, DataError when it cannot be written there.
    """
    for name in LOGS:  # before the checkpoint: a log that is ahead of it is cut by whoever goes on, one behind it has a hole
        with contextlib.suppress(FileNotFoundError):
            (place / name).write_bytes((logs / name).read_bytes())
    best = best_step(root)
    for one in (best, step) if best in steps_in(root) and best != step else (step,):
        _copy(root / checkpoint_name(one), place / CHECKPOINTS / checkpoint_name(one))
    with contextlib.suppress(FileNotFoundError):
        (place / CHECKPOINTS / BEST_FILE).write_bytes((root / BEST_FILE).read_bytes())
    _rotate(place, step, keep, best)


def _copy(source: Path, target: RemotePath) -> None:
    manifest = (source / MANIFEST).read_bytes()
    if not _holds(target / MANIFEST, manifest):
        (target / MANIFEST).remove()  # of the same step, saved before by a run that was taken up again from an earlier one
        for member in sorted(Checkpoint(source).members()):
            (target / member).upload(source / member)
        (target / MANIFEST).write_bytes(manifest)


def _holds(file: RemotePath, data: bytes) -> bool:
    try:
        return file.size_now() == len(data) and file.read_now() == data
    except Gone:
        return False


def _rotate(place: RemotePath, newest: int, keep: int, best: int | None) -> None:
    """Leaves the `keep` newest checkpoints and the best. Later ones than `newest` are of a run that was gone back on."""
    root = place / CHECKPOINTS
    there = sorted((step for name in root.names() if (step := parse_step(name)) is not None), reverse=True)
    kept = {best, *[step for step in there if step <= newest][:keep]}
    for step in there:
        if step not in kept:
            (root / checkpoint_name(step) / MANIFEST).remove()  # first: a half removed copy is none
            (root / checkpoint_name(step)).remove()


# ---------------------------------------------------------------------------------------------------------------------
# and back


def fetch_checkpoint(source: RemotePath, root: Path) -> Checkpoint:
    """Brings one checkpoint into `root`, verified before it is seen there, where it is not there yet. CheckpointError for a damaged one,
    SaveError for a disk that refuses."""
    final = root / source.name
    if (final / MANIFEST).is_file() and _holds(source / MANIFEST, (final / MANIFEST).read_bytes()):
        found = Checkpoint(final)
        found.verify()
        return found
    temporary = root / f".tmp-{source.name}-{uuid.uuid4().hex[:8]}"
    with refusals(str(final), str(temporary)):
        temporary.mkdir(parents=True)
        try:
            (source / MANIFEST).download(temporary / MANIFEST)
            found = Checkpoint(temporary)  # also looks at the names
            check_space(str(root), sum(entry["bytes"] for entry in found.manifest["files"].values()))
            for member in found.members():
                wanted, there = found.manifest["files"][member]["bytes"], (source / member).size_now()
                if there != wanted:
                    raise CheckpointError(f"{source / member} has {there} bytes, the manifest says {wanted}")
                (temporary / member).parent.mkdir(exist_ok=True)
                (source / member).download(temporary / member)
            found.verify()
        except (CheckpointError, Gone) as problem:  # that a network fails is no damage
            remove_tree(str(temporary))
            raise CheckpointError(f"{source}: {str(problem).replace(str(temporary), str(source))}") from None
        publish(str(temporary), str(final))
    return Checkpoint(final)


def fetch_newest(place: RemotePath, root: Path, warn: Callable[[str], None], choice: str = "") -> Checkpoint | None:
    """The newest checkpoint of a copy that verifies (choice: "best" or a step: that one), brought into `root`; None where there is none
    at all."""
    steps = steps_at(place)
    if choice:
        step = _best_there(place) if choice == "best" else int(choice) if choice.isdigit() else None
        if step not in steps:
            have = ", ".join(map(str, reversed(steps))) or "none"
            raise InputError(f"{place}: no checkpoint {choice!r} (there is: {have}{', and best' if _best_there(place) is not None else ''})")
        return fetch_checkpoint(place / CHECKPOINTS / checkpoint_name(step), root)
    problems: list[str] = []
    for step in steps:
        try:
            return fetch_checkpoint(place / CHECKPOINTS / checkpoint_name(step), root)
        except CheckpointError as problem:
            problems.append(str(problem))
            warn(f"{problem}; trying the one before it")
    if problems:
        raise CheckpointError(f"all checkpoints of {place} are damaged: {'; '.join(problems)}")
    return None


def _best_there(place: RemotePath) -> int | None:
    try:
        step = json.loads((place / CHECKPOINTS / BEST_FILE).read_now())["step"]
        return step if isinstance(step, int) else None
    except (Gone, ValueError, KeyError, TypeError):
        return None


def restore_run(place: RemotePath, run: Path, root: Path, logs: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """A run of which nothing is left here, as its copy has it: the newest checkpoint that verifies and the best one, in `root`, its
    configuration, tokenizer and logs. None where there is a checkpoint here, or no copy: then the place is written to, so that one
    that cannot be (DataError) is known before the first step."""
    if steps_in(root):
        return None
    newest = fetch_newest(place, root, warn)
    if newest is None:
        began = {"run": run.name, "began": datetime.now(UTC).isoformat(timespec="seconds")}
        (place / RUN_FILE).write_bytes(json.dumps(began).encode())
        return None
    best = _best_there(place)
    if best is not None:
        try:
            if best != newest.step:
                fetch_checkpoint(place / CHECKPOINTS / checkpoint_name(best), root)
            write_atomically(root / BEST_FILE, (place / CHECKPOINTS / BEST_FILE).read_now())
        except (CheckpointError, DataError) as problem:
            warn(f"the best checkpoint stays where it is: {problem}")
    logs.mkdir(parents=True, exist_ok=True)
    for name in LOGS:
        with contextlib.suppress(Gone):
            write_atomically(logs / name, (place / name).read_now())
    for member in newest.members("tokenizer/"):
        (run / member).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(run / member, newest.raw(member))
    write_atomically(run / "config.toml", newest.raw("config.toml"))  # last: with it the run has begun
    return newest


def fetched_run(source: RemotePath, choice: str, cache: Path, warn: Callable[[str], None]) -> Checkpoint:
    """A checkpoint to read from a copy of a run (its newest, or `choice`) or from the URL of one checkpoint, kept in `cache` as the
    only one of that run. InputError where there is none."""
    root = cache / "runs" / f"{hashlib.sha256(source.url.encode()).hexdigest()[:12]}-{source.name}"[:100] / CHECKPOINTS
    root.mkdir(parents=True, exist_ok=True)
    clean(root)
    if (source / MANIFEST).is_file():
        if choice:
            raise InputError(f"{source} is one checkpoint, so @{choice} means nothing; leave it out")
        found: Checkpoint | None = fetch_checkpoint(source, root)
    else:
        found = fetch_newest(source, root, warn, choice)
    if found is None:
        raise InputError(f"{source} holds no checkpoint; give the URL of a run's copy (checkpoint.mirror and the run's name)")
    for name in os.listdir(root):
        if name != found.folder.name:
            remove_tree(str(root / name))
    return found
