"""Work on a Ray cluster of this machine: a killed worker's unit is done again, once, and the certificate is the same."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from treadle.collatz import verify, workers
from treadle.collatz.certificates import Numbers, read
from treadle.collatz.ledger import Ledger
from treadle.errors import ConfigError, MissingExtra

START, END = (1 << 68) - 300, (1 << 68) + (1 << 22)


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"treadle\[ray\]"):
        verify.verify(START, END, tmp_path / "a.jsonl", cluster="ray")


@pytest.fixture
def small_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="ray is not installed (extra `ray`): the cluster is not tested")
    # Workers are to find the package of this checkout, wherever the tests are run from.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_changes_nothing(small_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = verify.verify(START, END, tmp_path / "alone.jsonl", bits=20, path="python", workers=1)
    said: list[str] = []
    killed: list[int] = []
    taking = verify._Run.take

    def take(self: verify._Run, done: workers.Done, path: str) -> None:
        """After each unit: a worker that is at work is killed, until two have been lost."""
        taking(self, done, path)
        end = time.monotonic() + 2
        while not isinstance(done.work, Numbers) and len(said) < 2 and time.monotonic() < end:
            busy = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit() and _is_at_work(folder)]
            if busy:
                os.kill(busy[0], signal.SIGKILL)
                killed.append(busy[0])
                break

    monkeypatch.setattr(verify._Run, "take", take)
    path = tmp_path / "cluster.jsonl"
    result = verify.verify(START, END, path, bits=20, path="python", workers=2, cluster="ray", say=said.append)
    assert len(killed) >= 2 <= len(said) and all("lost" in text for text in said), (killed, said)
    assert result.complete and result.digest == alone.digest
    assert not Ledger([read(path)]).overlaps  # no unit has two lines
    again = verify.verify(START, END, path, bits=20, path="python", workers=2, cluster="ray")
    assert again.digest == alone.digest and again.progress.done == again.progress.before


@pytest.mark.slow
def test_a_signal_stops_work_on_a_cluster_in_order(small_cluster: None, tmp_path: Path) -> None:
    """Ray takes SIGTERM for itself when it starts."""
    path = tmp_path / "a.jsonl"
    command = [sys.executable, "-m", "treadle", "collatz", "verify", "2^68", "--count", "2^26", "--bits", "22", "--path", "python",
               "--cluster", "ray", "--workers", "2", "--output", str(path)]  # fmt: skip
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 120
        while not (path.is_file() and path.stat().st_size > 2000) and time.monotonic() < end:
            time.sleep(0.05)
        run.terminate()
        out, error = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 75 and not error, error
    assert "stopped by SIGTERM; the same command continues" in out and len(read(path).records) > 0


def _is_at_work(folder: Path) -> bool:
    """A worker process of Ray that has a task of ours: it puts the function's name into its title."""
    try:
        return b"ray::" in (folder / "cmdline").read_bytes() and b"_remote" in (folder / "cmdline").read_bytes()
    except OSError:
        return False


def test_an_address_where_nothing_answers_is_a_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed (extra `ray`): the cluster is not tested")
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(ConfigError, match="no Ray cluster answers at"):
            verify.verify(START, END, tmp_path / "a.jsonl", cluster=address)
