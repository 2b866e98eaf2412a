"""A run on conversations beside the run it started from: on a plain text both are measured alike, so that forgetting shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import flags, make_text, treadle
from treadle.evaluation.report import held_out

ROWS = [
    {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}" + "!" * (n % 4)}]}
    for n in range(30)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "story.txt").write_text(make_text())
    (folder / "unseen.txt").write_text(make_text(80, seed=1))
    base = treadle("train", folder / "story.txt", "--output_dir", folder / "base", *flags(max_steps=2, eval_steps=2))
    assert base.returncode == 0, base.stderr
    keys = flags(max_steps=2, eval_steps=2, seq_len=96, objective="sft")
    for name, template in (("chatml", "chatml"), ("plain", "plain")):
        out = treadle("train", folder / "conversations.jsonl", "--from", folder / "base", "--output_dir", folder / name,
                      "--chat_template", template, *keys)  # fmt: skip
        assert out.returncode == 0, out.stderr
    return folder


def test_a_tuned_run_and_its_base_are_compared_on_a_plain_text(folder: Path) -> None:
    out = treadle(
        "compare",
        folder / "base",
        folder / "chatml",
        "--data",
        folder / "unseen.txt",
        "--output",
        folder / "table.json",
    )
    assert out.returncode == 0, out.stderr
    rows = json.loads((folder / "table.json").read_text())["rows"]
    assert all(0 < row["bpb"] < 12 for row in rows) and rows[0]["bpb"] != rows[1]["bpb"]
    text = held_out({"data": {"dataset_class": "conversations", "seq_len": 96}}, None, str(folder / "unseen.txt"))[
        "validation"
    ]
    size = len((folder / "unseen.txt").read_bytes())
    assert text.sets[0].statistics["bytes"] == size  # type: ignore[attr-defined]  # every byte, none as an answer


def test_what_is_read_in_two_ways_is_not_compared(folder: Path) -> None:
    out = treadle("compare", folder / "chatml", folder / "plain", "--data", folder / "conversations.jsonl")
    assert out.returncode == 2 and "another chat template" in out.stderr and "--data FILE" not in out.stderr
