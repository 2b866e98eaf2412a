"""Copies of a run's checkpoints in object storage, written when they are whole on disk. (fetching.py takes them back.)

URL/RUN/run.json                        whose copy it is
URL/RUN/checkpoints/step-00001000/...   as on disk; the manifest is copied last, so a copy without one is none
URL/RUN/checkpoints/best.json           which one is best
URL/RUN/*.jsonl, *.csv                  the logs, as they were at the last copy
"""

from __future__ import annotations

import contextlib
import json
import uuid
from datetime import UTC, datetime
from pathlib import Path

from treadle.checkpoint.layout import MANIFEST, checkpoint_name, parse_step, steps_in
from treadle.checkpoint.reader import Checkpoint
from treadle.checkpoint.retention import BEST_FILE, best_in
from treadle.errors import ConfigError, DataError
from treadle.files import write_atomically
from treadle.storage.remote import RemotePath
from treadle.storage.retries import Gone

LOGS = ("metrics.jsonl", "events.jsonl", "training_log.csv", "eval_log.csv")
CHECKPOINTS = "checkpoints"
RUN_FILE = "run.json"  # here and there: the run's own id
STAGES = "stages"  # the folder of a distillation's stages inside its run


def place_of(url: str, run: Path) -> RemotePath:
    """Where a run is copied to: URL/NAME, for a stage of a distillation URL/NAME/stages/STAGE."""
    parts = run.resolve().parts
    return RemotePath("/".join([url.rstrip("/"), *parts[-3 if run.parent.name == STAGES else -1 :]]))


def steps_at(place: RemotePath) -> list[int]:
    """Steps of the whole checkpoints there, newest first. DataError where it cannot be reached."""
    return [step for step in _begun_at(place) if (place / CHECKPOINTS / checkpoint_name(step) / MANIFEST).is_file()]


def _begun_at(place: RemotePath) -> list[int]:
    """Steps of all checkpoints there, half copied ones too, newest first."""
    return sorted((step for name in (place / CHECKPOINTS).names() if (step := parse_step(name)) is not None), reverse=True)


def best_file_at(place: RemotePath) -> bytes | None:
    """What a copy says is its best checkpoint, as bytes; None where it says nothing."""
    try:
        return (place / CHECKPOINTS / BEST_FILE).read_now()
    except Gone:
        return None


# ---- whose copy it is ----


def id_here(run: Path) -> str | None:
    """The identity of the run in a folder; None where there is none."""
    with contextlib.suppress(OSError):
        return _id_in((run / RUN_FILE).read_bytes())
    return None


def id_there(place: RemotePath) -> str | None:
    """The identity of the run whose copy this is; None where there is none."""
    try:
        return _id_in((place / RUN_FILE).read_now())
    except Gone:
        return None


def _id_in(data: bytes) -> str | None:
    try:
        found = json.loads(data)["id"]
        return found if isinstance(found, str) else None
    except (ValueError, KeyError, TypeError):
        return None


def refuse_another(place: RemotePath, mine: str | None) -> None:
    """ConfigError where the id there is another run's than `mine` (None: of a run that has never been copied)."""
    theirs = id_there(place)
    if theirs is not None and theirs != mine:
        raise ConfigError(f"{place} holds the checkpoints of another run; use another --run_name, or another --checkpoint.mirror. (To go on "
                          "with that run: the same command in a folder without checkpoints, without --fresh)")  # fmt: skip


def claim(place: RemotePath, run: Path) -> None:
    """Makes the place this run's, by writing there. ConfigError where it is another's, DataError where it cannot be written."""
    mine = id_here(run)
    refuse_another(place, mine)
    if mine is None:
        table = {"id": uuid.uuid4().hex, "run": run.name, "began": datetime.now(UTC).isoformat(timespec="seconds")}
        write_atomically(run / RUN_FILE, json.dumps(table).encode())
    (place / RUN_FILE).write_bytes((run / RUN_FILE).read_bytes())


# ---- copying ----


def copy_there(place: RemotePath, root: Path, logs: Path, step: int, keep: int, gone_back: bool = False) -> str:
    """Copies one checkpoint of `root`, the best one where that is not there yet, and the logs; then removes there what rotation would.
    Returns why that could not be, or "". gone_back: later ones there are of a course that was given up.

    Raises FileNotFoundError when the checkpoint is removed here meanwhile, DataError when it cannot be written there.
    """
    mark: bytes | None = None
    with contextlib.suppress(FileNotFoundError):
        mark = (root / BEST_FILE).read_bytes()  # once, and first: training may mark another one meanwhile
    for name in LOGS:  # before any checkpoint: a log that is ahead of it is cut by whoever goes on, one behind it has a hole
        with contextlib.suppress(FileNotFoundError):
            (place / name).write_bytes((logs / name).read_bytes())
    best = best_in(mark)
    for one in dict.fromkeys([best, step] if best in steps_in(root) else [step]):
        assert one is not None
        _copy(root / checkpoint_name(one), place / CHECKPOINTS / checkpoint_name(one))
    if mark is None:  # a best one that is only there stays the best
        best = best_in(best_file_at(place))
    else:
        (place / CHECKPOINTS / BEST_FILE).write_bytes(mark)
    try:
        _rotate(place, step, keep, best, gone_back)
    except DataError as problem:
        return str(problem)
    return ""


def _copy(source: Path, target: RemotePath) -> None:
    manifest = (source / MANIFEST).read_bytes()
    if not holds(target / MANIFEST, manifest):
        (target / MANIFEST).remove()  # of the same step, saved before by a run that was taken up again from an earlier one
        for member in sorted(Checkpoint(source).members()):
            (target / member).upload(source / member)
        (target / MANIFEST).write_bytes(manifest)


def holds(file: RemotePath, data: bytes) -> bool:
    """Whether a remote file has these contents."""
    try:
        return file.read_now() == data
    except Gone:
        return False


def _rotate(place: RemotePath, newest: int, keep: int, best: int | None, gone_back: bool) -> None:
    """Leaves the `keep` newest checkpoints up to `newest` and the best; later ones too, where nobody has gone back."""
    root, there = place / CHECKPOINTS, _begun_at(place)
    kept = {best, *[step for step in there if step <= newest][:keep], *([] if gone_back else [step for step in there if step > newest])}
    for step in there:
        if step not in kept:
            (root / checkpoint_name(step) / MANIFEST).remove()  # first: a half removed copy is none
            (root / checkpoint_name(step)).remove()
