"""Checkpoints: durable, verified, never a pickle; whatever a crash or a hand does to them, it is noticed."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from treadle.checkpoint import lock, retention, writer
from treadle.checkpoint.layout import checkpoint_name, safe_member, steps_in
from treadle.checkpoint.reader import Checkpoint, newest_valid
from treadle.checkpoint.tensors import parse_tensors, read_tensors, write_tensors
from treadle.errors import CheckpointError, RunLocked, SaveError

from .power_cut import Disk, RecordingOs

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool]


def tensors(value: int) -> dict[str, dict[str, torch.Tensor]]:
    made = {"a": torch.full((300,), float(value)), "b": torch.full((7, 5), value, dtype=torch.int64)}
    return {"model": made, "optimizer": made}


def save(root: Path, step: int, keep: int = 2) -> str:
    files = {"run_state.json": json.dumps({"step": step}).encode(), "tokenizer/meta.json": b"{}"}
    path = writer.save(root, step, tensors(step), files, {"versions": {}})
    retention.rotate(root, keep)
    return path


def warnings_of() -> tuple[list[str], object]:
    said: list[str] = []
    return said, said.append


# ---- the file format ----


def test_tensors_are_safetensors_both_ways(tmp_path: Path) -> None:
    made = {f"t{n}": torch.arange(6).reshape(2, 3).to(dtype) for n, dtype in enumerate(TYPES)}
    made |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "transposed": torch.randn(3, 5).t()}
    write_tensors(tmp_path / "ours.safetensors", made, {"format": "pt"})
    theirs = load_file(tmp_path / "ours.safetensors")
    save_file({k: v.contiguous() for k, v in made.items()}, tmp_path / "theirs.safetensors")
    ours = read_tensors(tmp_path / "theirs.safetensors")
    for name, tensor in made.items():
        for back in (theirs[name], ours[name]):
            assert back.dtype == tensor.dtype and back.shape == tensor.shape and torch.equal(back, tensor)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_tensors_or_an_error(data: bytes) -> None:
    try:
        parse_tensors(np.frombuffer(data, dtype=np.uint8), "fuzz")
    except CheckpointError:
        pass


def test_mutated_headers_are_errors_and_allocate_nothing(tmp_path: Path) -> None:
    """6000 hostile files with plausible headers: an error or equal bytes, and memory stays where it was."""
    import resource

    write_tensors(tmp_path / "good", tensors(3)["model"])
    good = (tmp_path / "good").read_bytes()
    length = int.from_bytes(good[:8], "little")
    header, dice = json.loads(good[8 : 8 + length]), random.Random(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    nasty = [-1, 0, 2**31, 2**62, 10**30, 1.5, "x", None, [], True, [10**9, 10**9], {}, "F64"]
    for _ in range(6000):
        bad = json.loads(json.dumps(header))
        entry = bad[dice.choice(list(bad))]
        field = dice.choice(list(entry))
        if isinstance(entry[field], list) and entry[field] and dice.random() < 0.7:
            entry[field][dice.randrange(len(entry[field]))] = dice.choice(nasty)
        else:
            entry[field] = dice.choice(nasty)
        text = json.dumps(bad).encode()
        whole = len(text).to_bytes(8, "little") + text + good[8 + length :]
        try:
            parse_tensors(np.frombuffer(whole, dtype=np.uint8), "hostile")
        except CheckpointError:
            refused += 1
    assert refused > 5200  # a mutation may hit upon an equal value
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # kB


# ---- what a crash leaves ----


def newest_step(root: Path) -> int | str:
    """The step whose tensors load, all of one save; 0 when there is none."""
    _said, warn = warnings_of()
    try:
        found = newest_valid(root, warn, quarantine=False)  # type: ignore[arg-type]
    except CheckpointError as problem:
        return f"all damaged: {problem}"
    if found is None:
        return 0
    values = {float(t.flatten()[0]) for stem in ("model", "optimizer") for t in found.tensors(stem).values()}
    return found.step if values == {float(found.step)} == {float(found.json("run_state.json")["step"])} else "mixed"


def power_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int = 3, limit: int = 20) -> tuple[int, list]:
    """(states tried, violations): each state must load a whole checkpoint no older than the last save that returned."""
    root, recorder = tmp_path / "root", RecordingOs()
    root.mkdir()
    monkeypatch.setattr(writer, "os", recorder)
    returned = [(0, 0)]
    for step in range(1, saves + 1):
        save(root, step)
        returned.append((len(recorder.operations), step))
    monkeypatch.setattr(writer, "os", os)
    disk, dice, tried, seen, wrong = Disk(root), random.Random(0), 0, set(), []
    place = tmp_path / "state"
    for number in range(len(recorder.operations) + 1):
        if number:
            disk.do(recorder.operations[number - 1])
        sure = max(step for at, step in returned if at <= number)
        for folders, contents in disk.states(dice, limit):
            identity = hash((sure, str(folders), str(sorted((n, hash(d)) for n, d in contents.items()))))
            if identity in seen:
                continue
            seen.add(identity)
            tried += 1
            shutil.rmtree(place, ignore_errors=True)
            disk.write_out(folders, contents, place)
            got = newest_step(place)
            if not (isinstance(got, int) and got >= sure):
                wrong.append((recorder.operations[number - 1][:2], sure, got))
    return tried, wrong


def test_no_power_cut_loses_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, wrong = power_cuts(tmp_path, monkeypatch)
    assert tried >= 1000 and not wrong, (tried, wrong[:3])


@pytest.mark.parametrize("mistake", ["no directory fsync", "no file fsync", "in place"])
def test_the_power_cut_model_sees_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    if mistake == "no directory fsync":
        monkeypatch.setattr(writer, "fsync_directory", lambda path: None)
    elif mistake == "no file fsync":
        real = RecordingOs.fsync
        monkeypatch.setattr(
            RecordingOs, "fsync", lambda self, d: real(self, d) if os.path.isdir(self._open[d]) else None
        )
    else:

        def in_place(root: Path, step: int, *contents: object) -> str:
            final = os.path.join(root, checkpoint_name(step))
            writer.os.mkdir(final)  # type: ignore[attr-defined]
            writer.write_members(final, step, *contents, {})  # type: ignore[arg-type]
            writer.fsync_directory(str(root))
            return final

        monkeypatch.setattr(writer, "save", in_place)
    _, wrong = power_cuts(tmp_path, monkeypatch, saves=2)
    assert wrong, f"a writer with the mistake {mistake!r} passed"


KILLED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.checkpoint.test_checkpoint import save
root = Path(sys.argv[1])
from treadle.checkpoint.layout import steps_in
step = max(steps_in(root), default=0)
print("ready", flush=True)
while True:
    step += 1
    save(root, step)
    print("saved", flush=True)
"""


def kill_while_saving(tmp_path: Path, times: int) -> None:
    repository, dice = str(Path(__file__).parents[2]), random.Random(1)
    for _ in range(times):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), repository], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        for _ in range(dice.randint(1, 3)):  # counted, not timed: a loaded machine saves slowly
            assert process.stdout.readline() == b"saved\n"
        time.sleep(dice.random() * 0.02)
        process.kill()
        process.communicate()
        assert isinstance(newest_step(tmp_path), int)
    assert max(steps_in(tmp_path)) > times
    writer.clean(tmp_path)
    assert not [n for n in os.listdir(tmp_path) if n.startswith(".")]


def test_killed_while_saving(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 6)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_while_saving_200_times(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 200)


# ---- damage ----


def test_every_kind_of_damage_is_noticed(tmp_path: Path) -> None:
    """Truncations, single flipped bits, missing and swapped files: all found, each by name."""
    folder, dice = Path(save(tmp_path / "a", 1)), random.Random(0)
    other = Path(save(tmp_path / "b", 2))
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    assert len(files) == 5
    for path in files:
        good = path.read_bytes()
        harmed = [good[: int(len(good) * share)] for share in (0, 0.01, 0.5, 0.99)] + [good[:-1], good + b"x"]
        for _ in range(200):
            flipped = bytearray(good)
            flipped[dice.randrange(len(good))] ^= 1 << dice.randrange(8)
            harmed.append(bytes(flipped))
        twin = other / path.relative_to(folder)
        if path.name not in ("manifest.json", "meta.json"):  # a whole manifest belongs to its own files
            harmed.append(twin.read_bytes())
        for data in harmed:
            if data == good:
                continue
            path.write_bytes(data)
            with pytest.raises(CheckpointError, match=path.name.split(".")[0]):
                Checkpoint(folder).verify()
        path.unlink()
        with pytest.raises(CheckpointError):
            Checkpoint(folder).verify()
        path.write_bytes(good)
    Checkpoint(folder).verify()


def test_manifests_from_elsewhere_cannot_point_outside(tmp_path: Path) -> None:
    import hashlib

    folder = Path(save(tmp_path, 1))
    secret = tmp_path / "secret"
    secret.write_text("x")
    for name in ("../secret", "/etc/passwd", "a/../../secret", "a/b/c", ".hidden", "manifest.json", ""):
        assert not safe_member(name)
        body = json.dumps({"schema": 1, "step": 1, "files": {name: {"bytes": 1, "sha256": "0"}}})
        digest = hashlib.sha256(body.encode()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps({"sha256": digest, "body": body}))
        with pytest.raises(CheckpointError, match="unsafe"):
            Checkpoint(folder)
    good = Path(save(tmp_path / "two", 1))
    (good / "model.safetensors").rename(tmp_path / "moved")
    (good / "model.safetensors").symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError):
        Checkpoint(good).verify()


@pytest.mark.parametrize(
    "manifest", ["", "{}", "[]", "null", '{"body": 5, "sha256": ""}', '{"body": "[]", "sha256": ""}', "[" * 5000]
)
def test_nonsense_manifests(tmp_path: Path, manifest: str) -> None:
    folder = Path(save(tmp_path, 1))
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError):
        Checkpoint(folder)


# ---- failing disks ----


@pytest.mark.parametrize("call", ["write", "fsync", "open", "rename", "mkdir"])
@pytest.mark.parametrize("number", [28, 122, 5, 30], ids=["ENOSPC", "EDQUOT", "EIO", "EROFS"])
def test_a_failing_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    save(tmp_path, 1)
    for failing in range(30):

        class Failing(RecordingOs):
            calls = 0

            def _count(self, failing: int = failing) -> None:
                self.calls += 1
                if self.calls == failing + 1:
                    raise OSError(number, os.strerror(number))

        real = getattr(RecordingOs, call)

        def wrapped(self: Failing, *arguments: object, real: object = real) -> object:
            self._count()
            return real(self, *arguments)  # type: ignore[operator]

        monkeypatch.setattr(Failing, call, wrapped, raising=False)
        stand_in = Failing()
        monkeypatch.setattr(writer, "os", stand_in)
        try:
            save(tmp_path, 2)
            failed = False
        except SaveError as problem:
            failed = True
            assert os.strerror(number) in str(problem) and "--checkpoint_dir" in str(problem)
        monkeypatch.setattr(writer, "os", os)
        if not failed:
            break  # the call is made fewer times than this
        assert newest_step(tmp_path) in (1, 2)
        assert not [n for n in os.listdir(tmp_path) if n.startswith(".tmp-")]
        shutil.rmtree(tmp_path / checkpoint_name(2), ignore_errors=True)
    assert failing > 0


def test_too_little_space_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(SaveError, match="MB are needed"):
        save(tmp_path, 1)
    assert os.listdir(tmp_path) == []


# ---- retention and lock ----


def test_rotation_keeps_what_another_run_is_built_on_while_that_is_there(tmp_path: Path) -> None:
    root, user = tmp_path / "base" / "checkpoints", tmp_path / "adapters"
    user.mkdir()
    save(root, 1)
    retention.keep_for(root / checkpoint_name(1), user)
    retention.keep_for(root / checkpoint_name(1), tmp_path / "base")  # of itself: no reason to keep it
    for step in (2, 3, 4):
        save(root, step)
    assert steps_in(root) == [4, 3, 1]
    user.rmdir()
    save(root, 5)
    assert steps_in(root) == [5, 4]
    retention.keep_for(tmp_path / "base", user)  # a folder that no rotation touches
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_rotation_keeps_the_newest_and_the_best_by_number(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9, 11):
        save(tmp_path, step, keep=99)
        os.utime(tmp_path / checkpoint_name(step), (1e9 - step, 1e9 - step))  # clocks lie
    retention.mark_best(tmp_path, 2, {"loss": 1.0})
    retention.rotate(tmp_path, 2)
    assert steps_in(tmp_path) == [11, 10, 2] and retention.best_step(tmp_path) == 2


def test_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    code = f"import time\nfrom pathlib import Path\nfrom treadle.checkpoint.lock import RunLock\nl = RunLock(Path({str(tmp_path)!r}))\nprint('held', flush=True)\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with pytest.raises(RunLocked, match=f"process {process.pid} on "):
        lock.RunLock(tmp_path)
    process.kill()
    process.wait()
    held = lock.RunLock(tmp_path)
    child = os.fork()
    if child == 0:  # a worker that outlives its parent must not keep the lock
        time.sleep(1)
        os._exit(0)
    time.sleep(0.3)  # the child's first act is to let go
    held.release()
    lock.RunLock(tmp_path).release()
    os.waitpid(child, 0)
