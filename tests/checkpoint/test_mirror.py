"""Checkpoints copied to object storage: whole or not at all, taken up again from there bit for bit, and never the run's problem."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest

import treadle
from tests.conftest import make_text
from tests.s3 import SECRET, Proxy
from treadle.checkpoint import fetching
from treadle.checkpoint.copies import copy_there, place_of, steps_at
from treadle.checkpoint.fetching import fetch_newest
from treadle.checkpoint.layout import MANIFEST, checkpoint_name, steps_in
from treadle.checkpoint.mirror import Mirror
from treadle.errors import CheckpointError, ConfigError, DataError, InputError
from treadle.models.pretrained import load_run, locate
from treadle.monitor.console import Console
from treadle.start import Request
from treadle.start import train as train_request
from treadle.storage import filesystems, retries
from treadle.storage.remote import RemotePath

KEYS: dict[str, Any] = {"tokenizer": "byte", "seq_len": 32, "batch_size": 2, "arch": "transformer", "hidden_size": 16, "num_hidden_layers": 1,
                        "num_attention_heads": 2, "eval_steps": 2, "eval_rows": 8, "save_steps": 2, "logging_steps": 1, "max_steps": 8, "save_total_limit": 2,
                        "num_workers": 0, "quiet": True}  # fmt: skip

KEYS_FOR_FLAGS = {key: value for key, value in KEYS.items() if key != "quiet"}


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.02)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(make_text(200))
    filesystems._handles().clear()
    return tmp_path


def train(name: str, mirror: str | None, **keys: Any) -> dict[str, Any]:
    extra = {"mirror": mirror} if mirror is not None else {}
    return treadle.train("text.txt", output_dir=name, **{**KEYS, **extra, **keys})


def losses(run: Path | str) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())]


def tree(url: str) -> dict[str, bytes]:
    system, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return {name[len(path) + 1 :]: system.cat_file(name) for name in system.find(path)}


@pytest.fixture()
def each_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training waits for every copy, so that none is passed over for a newer one."""
    offer = Mirror.offer

    def waiting(self: Mirror, step: int) -> None:
        offer(self, step)
        if (thread := self._thread) is not None:
            thread.join()

    monkeypatch.setattr(Mirror, "offer", waiting)


@pytest.mark.usefixtures("each_one")
def test_a_run_is_copied_whole_and_goes_on_from_there_bit_for_bit(server: Proxy, place: Path) -> None:
    train("whole", None)
    server.breaks("PUT /bucket/bits", "503", "cut", "503")
    train("runs/x", "s3://bucket/bits")
    assert len(server.broken) == 3
    there = tree("s3://bucket/bits/x")
    here = {str(f.relative_to("runs/x")): f.read_bytes() for f in Path("runs/x").rglob("*") if f.is_file()}
    steps = steps_in("runs/x/checkpoints")
    assert steps_at(RemotePath("s3://bucket/bits/x")) == steps and len(steps) in (2, 3)
    for name, data in here.items():
        if name.startswith("checkpoints/"):
            assert there[name] == data, name
    assert {"metrics.jsonl", "training_log.csv", "events.jsonl", "run.json"} <= there.keys()
    puts = [line for line in server.seen if line.startswith("PUT") and f"{checkpoint_name(8)}/" in line]
    assert MANIFEST in puts[-1] and len(puts) > 3, "the manifest comes last"
    order = [line for line in server.seen if line.startswith("PUT") and (f"{checkpoint_name(8)}/" in line or "metrics.jsonl" in line)]
    assert MANIFEST in order[-1], "no log comes after its checkpoint: a copy cut off between them would have a hole"
    events = [json.loads(line) for line in Path("runs/x/events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "mirrored"][-1] == 8 and not [e for e in events if e["event"] == "mirror_failed"]

    # another machine: nothing is left here, and there is a copy of up to step 6, with the beginning of another one
    system = fsspec.core.url_to_fs("s3://bucket/bits", use_listings_cache=False)[0]
    system.rm(f"bucket/bits/x/checkpoints/{checkpoint_name(8)}/{MANIFEST}")
    shutil.move("runs/x", "before")
    train("runs/x", "s3://bucket/bits")
    assert losses("runs/x") == losses("before") == losses("whole")
    last = f"checkpoints/{checkpoint_name(8)}/model.safetensors"
    assert Path("runs/x", last).read_bytes() == Path("whole", last).read_bytes() == tree("s3://bucket/bits/x")[last]
    events = [json.loads(line) for line in Path("runs/x/events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "resumed"] == [6]
    for name, data in (tree("s3://bucket/bits") | {str(f): f.read_bytes() for f in place.rglob("*") if f.is_file()}).items():
        assert SECRET.encode() not in data, name


def test_weights_come_from_a_copy(server: Proxy, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("runs/a", "s3://bucket/weights")
    url = "s3://bucket/weights/a"
    for which in (url, f"{url}@best", f"{url}@8", f"{url}/checkpoints/{checkpoint_name(8)}"):
        found = load_run(which)
        assert found.tokenizer is not None
        local = load_run(which.replace("s3://bucket/weights", "runs"))
        assert found.checkpoint.step == local.checkpoint.step
        assert all((a == b).all() for a, b in zip(found.model.state_dict().values(), local.model.state_dict().values()))
    server.breaks("GET /bucket/weights")
    locate(f"{url}/checkpoints/{checkpoint_name(8)}")
    assert not [line for line in server.seen if "safetensors" in line], "what was fetched is kept"
    train_request(Request("text.txt", {**KEYS_FOR_FLAGS, "output_dir": "runs/b"}, weights_from=url, flags_are_text=False), Console(quiet=True))
    assert losses("runs/b")[0][1] < losses("runs/a")[0][1] - 0.01, "it began with trained weights"
    with pytest.raises(InputError, match=r"no checkpoint '5' \(there is: .*8, and best\)"):
        locate(f"{url}@5")
    with pytest.raises(InputError, match="holds no checkpoint"):
        locate("s3://bucket/weights/none")
    with pytest.raises(ConfigError, match="carries credentials"):
        locate("s3://key:secret@bucket/a")


def test_what_goes_wrong_there_is_a_warning_and_the_next_one_is_tried(server: Proxy, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "ATTEMPTS", 1)
    train("runs/w", None)
    root = Path("runs/w/checkpoints").absolute()
    said: list[str] = []
    events: list[dict[str, Any]] = []
    mirror = Mirror(RemotePath("s3://bucket/wrong/w"), Path("runs/w").absolute(), root, Path("runs/w").absolute(), 2, said.append, lambda kind, **what: events.append({"event": kind, **what}))
    server.breaks("PUT /bucket/wrong", *["503"] * 50)
    mirror.offer(6)
    mirror.close()
    assert len(said) == 1 and "step-00000006 was not copied to s3://bucket/wrong/w" in said[0] and "training goes on" in said[0]
    assert [e["event"] for e in events] == ["mirror_failed"] and mirror.in_use == set()
    server.breaks("")
    mirror.offer(8)
    mirror.close()
    assert len(said) == 1 and events[-1]["event"] == "mirrored" and steps_at(mirror.place) == [8]


def test_a_newer_checkpoint_takes_the_place_of_a_waiting_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from treadle.checkpoint import mirror as module

    go, copied = threading.Event(), []

    def slow(place: Any, root: Path, logs: Path, step: int, keep: int, gone_back: bool) -> str:
        assert go.wait(20)
        copied.append(step)
        return ""

    monkeypatch.setattr(module, "copy_there", slow)
    mirror = Mirror(RemotePath("memory://x"), tmp_path, tmp_path, tmp_path, 2, lambda text: None, lambda *a, **k: None)
    for step in (2, 4, 6):
        mirror.offer(step)
        while mirror._copied != 2:
            time.sleep(0.01)
    assert mirror.in_use == {2, 6}, "rotation leaves both here"
    go.set()
    mirror.close()
    assert copied == [2, 6]


@pytest.mark.usefixtures("each_one")
def test_a_damaged_copy_is_named_and_the_one_before_it_is_taken(server: Proxy, place: Path, tmp_path: Path) -> None:
    train("runs/d", "s3://bucket/damage")
    source = RemotePath("s3://bucket/damage/d")
    steps = steps_at(source)
    model = source / "checkpoints" / checkpoint_name(steps[0]) / "model.safetensors"
    data = bytearray(model.read_now())
    data[len(data) // 2] ^= 1
    model.write_bytes(bytes(data))
    said: list[str] = []
    found = fetch_newest(source, tmp_path / "there", said.append)
    assert found is not None and found.step == steps[1]
    assert len(said) == 1 and "model.safetensors is damaged" in said[0] and str(tmp_path) not in said[0]
    assert {p.name for p in (tmp_path / "there").iterdir()} == {checkpoint_name(steps[1])}
    for step in steps[1:]:
        (source / "checkpoints" / checkpoint_name(step) / "run_state.json").remove()
    with pytest.raises(CheckpointError, match=r"all checkpoints of s3://bucket/damage/d are damaged"):
        fetch_newest(source, tmp_path / "again", said.append)
    shutil.rmtree("runs/d")
    with pytest.raises(CheckpointError, match="are damaged"):  # never from scratch in silence
        train("runs/d", "s3://bucket/damage")


def test_a_network_that_fails_is_no_damage(server: Proxy, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "ATTEMPTS", 1)
    train("runs/n", "s3://bucket/network")
    server.breaks("model.safetensors", *["503"] * 50)
    with pytest.raises(DataError, match="times in a row") as problem:
        fetch_newest(RemotePath("s3://bucket/network/n"), tmp_path / "there", lambda text: None)
    assert not isinstance(problem.value, CheckpointError)
    server.breaks("")


def test_another_runs_copy_is_never_written_over(server: Proxy, place: Path) -> None:
    train("runs/o", "s3://bucket/other")
    shutil.move("runs/o", "elsewhere")
    before = tree("s3://bucket/other")
    with pytest.raises(ConfigError, match="holds the checkpoints of another run"):
        request = Request("text.txt", {**KEYS_FOR_FLAGS, "mirror": "s3://bucket/other", "output_dir": "runs/o"}, fresh=True, flags_are_text=False)
        train_request(request, Console(quiet=True))
    with pytest.raises(ConfigError, match="hidden_size was 16 when this run started"):
        train("runs/o", "s3://bucket/other", hidden_size=32)
    assert tree("s3://bucket/other") == before


def test_a_place_that_cannot_be_written_is_known_before_the_first_step(server: Proxy, place: Path) -> None:
    with pytest.raises(DataError, match="there is no such bucket or folder"):
        train("runs/p", "s3://no-such-bucket/x")
    assert not fsspec.core.url_to_fs("s3://bucket", use_listings_cache=False)[0].exists("no-such-bucket")
    assert not steps_in("runs/p/checkpoints") and not Path("runs/p/metrics.jsonl").exists()
    with pytest.raises(ConfigError, match="is no URL"):
        train("runs/p", "somewhere")
    with pytest.raises(ConfigError, match="carries credentials"):
        train("runs/p", "s3://key:secret@bucket/x")
    treadle_check = Request("text.txt", {**KEYS_FOR_FLAGS, "mirror": "s3://no-such-bucket/x"}, flags_are_text=False)
    from treadle.dry_run import check

    assert check(treadle_check, Console(quiet=True))["loss"] > 0, "check writes nowhere"


def test_rotation_there_follows_the_run(place: Path, tmp_path: Path) -> None:
    train("runs/r", None, save_total_limit=10)
    root, logs, there = Path("runs/r/checkpoints"), Path("runs/r"), RemotePath("memory://rotation/r")
    for step in (2, 4, 6, 8):
        copy_there(there, root, logs, step, keep=10)
    assert steps_at(there) == [8, 6, 4, 2]
    (root / "best.json").write_text(json.dumps({"step": 2, "checkpoint": checkpoint_name(2), "metrics": {}}))
    copy_there(there, root, logs, 6, keep=2)
    assert steps_at(there) == [8, 6, 4, 2], "nobody has gone back: a later one stays"
    copy_there(there, root, logs, 6, keep=2, gone_back=True)  # step 8 is of another course
    assert steps_at(there) == [6, 4, 2]
    (root / "best.json").write_text(json.dumps({"step": 6, "checkpoint": checkpoint_name(6), "metrics": {}}))
    copy_there(there, root, logs, 8, keep=2)
    assert steps_at(there) == [8, 6]
    assert place_of("s3://b/x/", Path("/data/runs/name")).url == "s3://b/x/name"
    assert place_of("s3://b/x", Path("/data/runs/name/stages/mixer")).url == "s3://b/x/name/stages/mixer"


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


@pytest.mark.slow  # the same of one process is test_a_run_is_copied_whole_and_goes_on_from_there_bit_for_bit
@pytest.mark.timeout(900)
def test_two_processes_killed_whose_folder_is_lost_go_on_from_the_copy(server: Proxy, place: Path) -> None:
    flags = ["--streaming", "true", "--devices", "2", "--mirror", "s3://bucket/killed", "--tokenizer", "byte", "--seq_len", "32", "--batch_size", "2",
             "--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--save_steps", "3", "--logging_steps", "1",
             "--max_steps", "240", "--eval_steps", "30", "--num_workers", "1"]  # fmt: skip
    (place / "texts").mkdir()
    (place / "texts" / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in make_text(2000).splitlines() if line))
    RemotePath("s3://bucket/killed-texts/a.jsonl").upload(place / "texts" / "a.jsonl")

    def start(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "treadle", "train", "s3://bucket/killed-texts", *flags, "--run_name", name]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)

    assert start("whole").wait(300) == 0
    dice, met = random.Random(1), 0
    while met < 6:
        process = start("parts")
        copy = RemotePath("s3://bucket/killed/parts")
        before, end = steps_at(copy)[:1], time.monotonic() + 120
        while steps_at(copy)[:1] == before and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(dice.uniform(0, 0.3))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        while left := [int(f.parent.name) for f in Path("/proc").glob("[0-9]*/cmdline") if b"run_name\0parts" in _read(f)]:
            for number in left:  # the processes that it started; one that lives writes into the folder that is removed next
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            time.sleep(0.05)
        met += 1
        shutil.rmtree("runs/parts", ignore_errors=True)
    assert met >= 3
    assert start("parts").wait(300) == 0
    assert losses("runs/parts") == losses("runs/whole")
    last = f"checkpoints/{checkpoint_name(240)}/model.safetensors"
    assert Path("runs/parts", last).read_bytes() == Path("runs/whole", last).read_bytes() == tree("s3://bucket/killed/parts")[last]


@pytest.mark.usefixtures("each_one")
def test_a_folder_behind_its_copy_goes_on_from_the_copy(place: Path) -> None:
    train("runs/s", "memory://behind", save_total_limit=10)
    there = RemotePath("memory://behind/s")
    before = steps_at(there)
    for step in (6, 8):
        shutil.rmtree(f"runs/s/checkpoints/{checkpoint_name(step)}", ignore_errors=True)
    assert steps_in("runs/s/checkpoints")[0] < 8
    train("runs/s", "memory://behind", save_total_limit=10)
    assert steps_in("runs/s/checkpoints")[0] == 8 and steps_at(there) == before
    assert [step for step, _ in losses("runs/s")][-1] == 8


@pytest.mark.usefixtures("each_one")
def test_a_refused_start_and_another_run_leave_the_copy_alone(place: Path) -> None:
    train("runs/r2", "memory://refused")
    before = tree("memory://refused")
    shutil.copytree("runs/r2", "kept")
    Path("text.txt").write_text(make_text(150, seed=3))
    with pytest.raises(ConfigError, match="data"):
        train("runs/r2", "memory://refused", max_steps=12)
    assert tree("memory://refused") == before
    shutil.rmtree("runs/r2")
    train("runs/r2", None, max_steps=4)  # another run of that name, never copied
    with pytest.raises(ConfigError, match="holds the checkpoints of another run"):
        train("runs/r2", "memory://refused", max_steps=4)
    assert tree("memory://refused") == before


@pytest.mark.usefixtures("each_one")
@pytest.mark.parametrize("cut_at", ["metrics.jsonl", "best.json", "model.safetensors"])
def test_taking_a_run_up_that_is_cut_off_is_finished_by_the_next_start(place: Path, monkeypatch: pytest.MonkeyPatch, cut_at: str) -> None:
    train("runs/c", "memory://cut")
    expected = losses("runs/c")
    shutil.rmtree("runs/c")
    read, download = RemotePath.read_now, RemotePath.download

    def failing(self: RemotePath, *arguments: Any) -> Any:
        if self.name == cut_at:
            raise retries.Unreachable("cut off")
        return (download if arguments else read)(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RemotePath, "read_now", failing)
        patch.setattr(RemotePath, "download", failing)
        with pytest.raises(DataError, match="cut off"):
            train("runs/c", "memory://cut")
        with pytest.raises(DataError, match="cut off"):  # what is half here does not count as a run
            train("runs/c", "memory://cut")
    with pytest.raises(ConfigError, match=r"run\.seed was 0"):
        train("runs/c", "memory://cut", seed=99)
    train("runs/c", "memory://cut")
    assert losses("runs/c") == expected and not Path("runs/c", fetching.UNFINISHED).exists()
    assert {8} <= set(steps_in("runs/c/checkpoints")) and steps_at(RemotePath("memory://cut/c"))[0] == 8


@pytest.mark.usefixtures("each_one")
def test_several_checkpoints_of_a_copy_can_be_read_and_a_damaged_one_is_fetched_again(place: Path) -> None:
    train("runs/m", "memory://many", save_total_limit=10)
    first, second = locate("memory://many/m@6"), locate("memory://many/m@8")
    first.verify()
    second.verify()
    file = second.folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert locate("memory://many/m").step == 8
    locate("memory://many/m@8").verify()


def test_the_mark_of_the_best_and_rotation_there(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from treadle.checkpoint import copies

    train("runs/b2", None, save_total_limit=10)
    root, logs, there = Path("runs/b2/checkpoints"), Path("runs/b2"), RemotePath("memory://marks/b2")
    mark = {step: json.dumps({"step": step, "checkpoint": checkpoint_name(step), "metrics": {}}) for step in (4, 8)}
    (root / "best.json").write_text(mark[4])
    copy = copies._copy

    def marking(source: Path, target: RemotePath) -> None:
        copy(source, target)
        (root / "best.json").write_text(mark[8])  # training finds a better one meanwhile

    monkeypatch.setattr(copies, "_copy", marking)
    write, order = RemotePath.write_bytes, []
    monkeypatch.setattr(RemotePath, "write_bytes", lambda self, data: (order.append(self.name), write(self, data))[1])
    copy_there(there, root, logs, 6, keep=2)
    assert order.index("metrics.jsonl") < order.index(MANIFEST)
    assert steps_at(there) == [6, 4] and json.loads((there / "checkpoints" / "best.json").read_now())["step"] == 4
    (root / "best.json").unlink()  # as after a start to which the best could not be brought
    copy_there(there, root, logs, 8, keep=1)
    assert steps_at(there) == [8, 4], "the best that is only there stays"

    def refused(*arguments: Any) -> None:
        raise DataError("Access Denied")

    monkeypatch.setattr(copies, "_rotate", refused)
    said: list[str] = []
    events: list[str] = []
    mirror = Mirror(there, logs, root, logs, 1, said.append, lambda kind, **what: events.append(kind))
    mirror.offer(8)
    mirror.close()
    assert events == ["mirrored"] and "was copied; older copies could not be removed" in said[0]


def test_a_run_that_goes_on_with_a_place_that_cannot_be_written_is_told_so_first(server: Proxy, place: Path) -> None:
    train("runs/g", None, max_steps=4)
    with pytest.raises(DataError, match="there is no such bucket or folder"):
        train("runs/g", "s3://no-such-bucket/x", max_steps=8)
    assert steps_in("runs/g/checkpoints")[0] == 4
