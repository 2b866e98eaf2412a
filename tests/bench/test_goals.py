"""A goal is met only by a figure; what is missing is skipped with its reason, whatever the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import goals, gpu, hook
from bench.goals import FILE, flat, judge

TOML = """
[[goal]]
name = "speed"
section = "training"
value = "contest: ratio"
at_least = 2.0

[[goal]]
name = "memory"
section = "memory"
value = "memory: GB"
on = ["amx"]
at_most = 0.8
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "goals.toml"
    path.write_text(TOML)
    return path


@pytest.mark.parametrize(
    "parts, outcomes",
    [
        ({"contest": {"ratio": 2.0}, "memory": {"GB": 0.8}}, ["met", "met"]),
        ({"contest": {"ratio": 1.8}, "memory": {"GB": 1.0}}, ["MISSED by 10%", "MISSED by 25%"]),
        ({"contest": {"ratio": "skipped (no peer)"}, "memory": {"memory": "skipped (no part)"}}, ["skipped (no peer)", "skipped (no part)"]),
        ({"contest": {"ratio": float("nan")}}, ["skipped (not measured)", "skipped (not measured)"]),
    ],
)  # fmt: skip
def test_verdicts(file: Path, parts: dict, outcomes: list[str]) -> None:
    assert [one.outcome for one in judge(flat(parts), "amx", file)] == outcomes


def test_a_goal_of_another_machine_is_not_judged(file: Path) -> None:
    assert [one.name for one in judge({}, "plain", file)] == ["speed"]


def test_every_goal_names_a_part_and_one_bound() -> None:
    import tomllib

    from bench.run import PARTS

    for goal in tomllib.loads(FILE.read_text())["goal"]:
        assert goal["value"].split(":")[0] in PARTS, goal
        assert ("at_least" in goal) != ("at_most" in goal), goal
        assert set(goal) <= {"name", "section", "value", "on", "at_least", "at_most"}, goal


def test_every_model_that_serving_measures_has_its_goal_and_its_miss_is_listed() -> None:
    from bench.run import PARTS
    from bench.serving import CASES

    assert "serving" in PARTS
    figure = "sixteen at once over one at a time"
    said = judge(flat({"serving": {f"{name}, {figure}": 5.4 for name in CASES}}), "plain")
    missed = {one.name for one in said if one.outcome == "MISSED by 10%" and one.wanted == "at least 6"}
    assert missed == {f"sixteen concurrent requests against one at a time, {name}, tokens per CPU-second" for name in CASES}


def test_the_newest_gpu_run_counts(tmp_path: Path) -> None:
    assert goals.of_a_gpu(tmp_path) == {}
    for day, speed in (("20260101", 1.0), ("20260102", 2.0)):
        (tmp_path / f"gpu-{day}.json").write_text(f'{{"parts": {{"gpu": {{"x": {speed}}}}}}}')
    assert goals.of_a_gpu(tmp_path) == {"gpu: x": 2.0}


def test_the_gpus_parts_at_toy_size_on_cpu() -> None:
    found = gpu.ceilings("cpu", True) | gpu.our_steps("cpu", True, False) | gpu.plain_steps("cpu", True, False)
    assert all(value > 0 for value in found.values())
    assert found["124M ours eager: last loss over first"] < 1
    made = gpu.ratios(found)
    assert made["124M ours eager over plain eager"] > 0
    assert made["124M ours compiled over plain compiled"] == "skipped (not measured)"


def test_the_hook_reads_means_and_the_first_step(tmp_path: Path) -> None:
    log = tmp_path / "log"
    rows = [f'{{"wall": {10 + 2 * i}, "cpu": {5 + 3 * i}, "faults": {i}, "peak_gb": {i}}}' for i in range(4)]
    log.write_text("\n".join(['{"name": "x", "parameters": 1}', *rows, '{"end": {"losses": [2, 1]}}']))
    found = hook.read(log, skip=2, begun=7.0)
    assert (found["wall"], found["cpu"], found["faults"], found["peak_gb"]) == (2, 3, 1, 3)
    assert (found["first_step_cpu"], found["first_step_wall"], found["losses"]) == (5, 3, [2, 1])
