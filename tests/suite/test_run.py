"""`treadle compare --suite`: trained, resumed and reused, in one table."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.conftest import treadle

pytestmark = pytest.mark.timeout(900)  # some forty short processes, on a machine that may be busy

SUITE = """
base = "{text}"
seeds = {seeds}
parameters = 20_000
learning_rates = [1e-2]
measure = {measure}
[budget]
bytes = 8192
[keys]
seq_len = 32
per_device_train_batch_size = 4
"tokenizer.name" = "byte"
eval_rows = 16
[shape]
num_layers = 1
num_heads = 2
{more}
[[entries]]
label = "dense"
learning_rates = [1e-5, 1e-2]
[[entries]]
label = "recurrent"
keys = {{ layer_types = ["retnet"] }}
"""


def written(folder: Path, text_file: Path, seeds: int = 1, measure: bool = False, more: str = "") -> Path:
    path = folder / "some.toml"
    path.write_text(SUITE.format(text=text_file, seeds=seeds, measure=str(measure).lower(), more=more), encoding="utf-8")
    return path


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "suite.json").read_text())  # type: ignore[no-any-return]


def logs(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob("runs/*/eval_log.csv"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> tuple[Path, Path, str]:
    """(the suite file, the folder of a run that nothing disturbed, what it said)."""
    folder = tmp_path_factory.mktemp("suite")
    path = written(folder, text_file, seeds=2, measure=True, more='[probes]\nnames = ["copy"]\nsteps = 4\nparameters = 20_000')
    out = treadle("compare", "--suite", path, "--workers", 2, "--output", folder / "out", timeout=500)
    assert out.returncode == 0, out.stderr
    return path, folder / "out", out.stdout


def test_a_suite_ends_in_a_table(whole: tuple[Path, Path, str]) -> None:
    _, folder, said = whole
    found = result_of(folder)
    assert found["done"] and found["metric"] == "bpb" and {job["state"] for job in found["jobs"]} == {"done"}
    assert found["data"]["same_rows_in_the_same_order"]
    dense, recurrent = found["rows"]
    assert dense["learning_rate"] == 1e-2  # 1e-5 learns nothing
    assert dense["paired"] is None and recurrent["paired"]["against"] == "dense" and recurrent["paired"]["seeds"] == 2
    for row in found["rows"]:
        cells = row["cells"]
        assert len(cells["bpb"]["values"]) == 2 and cells["bpb"]["low"] <= cells["bpb"]["mean"] <= cells["bpb"]["high"] < 8
        assert {"step_time_ratio", "tokens_per_second", "decode_1k", "decode_8k", "state_1k", "state_8k", "peak_memory_gb", "copy"} < set(cells)
    difference = [a - b for a, b in zip(recurrent["cells"]["bpb"]["values"], dense["cells"]["bpb"]["values"])]
    assert recurrent["paired"]["difference"] == pytest.approx(sum(difference) / 2)
    assert dense["cells"]["state_8k"]["mean"] == pytest.approx(8 * dense["cells"]["state_1k"]["mean"], rel=0.1)
    assert recurrent["cells"]["state_8k"] == recurrent["cells"]["state_1k"]
    assert found["cost"]["of_search"] > 0 and found["cost"]["cpu_seconds"] > found["cost"]["of_search"]
    assert "to choose learning rates" in said and "recurrent" in (folder / "suite.md").read_text()
    drawn = {element.text for element in ElementTree.parse(folder / "suite.svg").getroot().iter()}
    assert {"dense", "recurrent"} < drawn


def test_the_same_command_repeats_nothing(whole: tuple[Path, Path, str]) -> None:
    path, folder, said = whole
    before, found = logs(folder), result_of(folder)
    out = treadle("compare", "--suite", path, "--workers", 2, "--output", folder, timeout=500)
    assert out.returncode == 0 and "10 of 10 jobs had finished before" in out.stdout
    assert out.stdout.splitlines()[-5:] == said.splitlines()[-5:] and logs(folder) == before
    assert result_of(folder)["rows"] == found["rows"]


def one_rate(path: Path) -> Path:
    """Without a search."""
    path.write_text(path.read_text().replace("[1e-5, 1e-2]", "[1e-2]"))
    return path


def test_after_kill_minus_nine_it_goes_on_and_finds_the_same(whole: tuple[Path, Path, str], text_file: Path, tmp_path: Path) -> None:
    path, folder = one_rate(written(tmp_path, text_file)), tmp_path / "out"
    line = [sys.executable, "-m", "treadle", "compare", "--suite", str(path), "--workers", "1", "--output", str(folder)]
    child = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 300
        while not list(folder.glob("runs/recurrent-run*/checkpoints/*")):
            assert time.monotonic() < until and child.poll() is None
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait(90)
    finally:
        child.kill()
    assert [job["state"] for job in result_of(folder)["jobs"]] == ["done", "running"]
    until = time.monotonic() + 60  # a run whose parent was killed saves itself, and has the lock until then
    while subprocess.run(["pgrep", "-f", f"output_dir={folder}"], capture_output=True).stdout and time.monotonic() < until:
        time.sleep(0.05)
    out = treadle("compare", "--suite", path, "--workers", 1, "--output", folder, timeout=500)
    assert out.returncode == 0 and "1 of 2 jobs had finished before" in out.stdout, out.stderr
    assert "Resumed from step" in next(folder.glob("runs/recurrent-run*/suite.out")).read_text()
    found, same = logs(folder), logs(whole[1])
    assert len(found) == 2 and all(same[name] == log for name, log in found.items())


def test_sizes_give_curves_and_an_honest_refusal(text_file: Path, tmp_path: Path) -> None:
    path = one_rate(written(tmp_path, text_file))
    path.write_text(path.read_text().replace("parameters = 20_000", "sizes = [20_000, 40_000]").rpartition("[[entries]]")[0])
    out = treadle("compare", "--suite", path, "--workers", 2, "--output", tmp_path / "out", timeout=500)
    assert out.returncode == 0 and "dense: no scaling law: 2 size(s)" in out.stdout, out.stderr
    found = result_of(tmp_path / "out")
    assert [len(curve["points"]) for curve in found["scaling"]] == [2] and found["scaling"][0]["fit"] is None
    assert [row["paired"] for row in found["rows"]] == [None, None]


@pytest.mark.parametrize(("line", "said"), [
    ((), "--suite"),
    (("--workers", 2), "--suite FILE.toml"),
    (("run", "--suite", "quick"), "leave run out"),
    (("--suite", "nothing"), "architectures"),
    (("--suite", "missing.toml"), "no such file"),
])  # fmt: skip
def test_a_call_that_makes_no_sense_says_what_to_type(line: tuple[Any, ...], said: str) -> None:
    out = treadle("compare", *line)
    assert out.returncode == 2 and said in out.stderr


def test_a_key_that_is_refused_ends_it_before_anything_runs(text_file: Path, tmp_path: Path) -> None:
    path = written(tmp_path, text_file)
    path.write_text(path.read_text().replace('layer_types = ["retnet"]', "hidden_siz = 3"))
    out = treadle("compare", "--suite", path, "--output", tmp_path / "out", timeout=500)
    assert out.returncode == 2 and "recurrent" in out.stderr and "hidden_size" in out.stderr and not (tmp_path / "out" / "runs").exists()


def test_on_a_ray_cluster_it_finds_the_same(whole: tuple[Path, Path, str], text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    path = one_rate(written(tmp_path, text_file))
    line = [sys.executable, "-m", "treadle", "compare", "--suite", path, "--workers", "2", "--ray", "--output", tmp_path / "out"]
    out = subprocess.run(line, capture_output=True, text=True, timeout=500)
    assert out.returncode == 0, out.stderr
    found, same = logs(tmp_path / "out"), logs(whole[1])
    assert len(found) == 2 and all(same[name] == log for name, log in found.items())


OWN = """
from treadle import errors
from treadle.models.transformer import Transformer


class Mine(Transformer):
    arch = "mine"


class Picky(Transformer):
    arch = "picky"

    def embed(self, batch, context):
        raise errors.ConfigError("no such rows, please")
"""


def test_a_model_of_ones_own_and_one_that_refuses(text_file: Path, tmp_path: Path) -> None:
    path, mine = one_rate(written(tmp_path, text_file, measure=True)), tmp_path / "mine.py"
    mine.write_text(OWN)
    entries = "".join(f'[[entries]]\nlabel = "{name}"\narchitecture = "{mine}:{name}"\n' for name in ("Picky", "Mine"))
    path.write_text(path.read_text().partition("[[entries]]")[0] + entries)
    line = ("compare", "--suite", path, "--workers", 2, "--output", tmp_path / "out")
    out = treadle(*line, timeout=500)
    assert out.returncode == 2 and "--trust-code" in out.stderr and not (tmp_path / "out" / "runs").exists()
    out = treadle(*line, "--trust-code", mine, timeout=500)
    jobs = {job["label"]: job for job in result_of(tmp_path / "out")["jobs"]}
    assert jobs["Mine, seed 0"]["state"] == "done", out.stdout  # the refused one before it ended nothing
    assert jobs["Picky, seed 0"]["state"] == "failed" and "no such rows, please" in jobs["Picky, seed 0"]["problem"]
    assert out.returncode == 1 and "failed: Picky, seed 0: error: no such rows" in out.stdout and (tmp_path / "out" / "suite.md").is_file()
    measured = {path.parent.name.partition("-")[0]: path.read_text() for path in tmp_path.glob("out/measured/*/suite.out")}
    assert "no such rows" in measured["Mine"] and "trust" not in measured["Mine"]  # beside Picky, whose step is the first's
