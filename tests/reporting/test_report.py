"""`treadle report` from the command line: of a trained run, of sweeps and suites, of thousands of steps, of what is no run."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import flags, treadle
from tests.reporting.conftest import ENDS_A_SCRIPT, write_run
from treadle.errors import InputError
from treadle.evaluation.report import evaluator_of, held_out
from treadle.models.pretrained import load_run
from treadle.reporting import planned as planning
from treadle.reporting.bars import svg_bars
from treadle.reporting.passages import pieces_of, token_losses
from treadle.reporting.report import write_report
from treadle.text.byte import ByteTokenizer


def data_of(path: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), flags=re.S)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture(scope="module")
def trained(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny hnet: text, chunks, a plan."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    own = {"hidden_sizes": "[16,16]", "num_blocks": "[[1,0,1],[1]]", "target_ratios": "[3.0]"}
    line = flags(output_dir=folder, max_steps=6, eval_steps=3, sample_tokens=4, **{f"model__{key}": value for key, value in own.items()})
    for key in ("--hidden_size", "--num_layers", "--num_heads"):
        at = line.index(key)
        del line[at : at + 2]
    out = treadle("train", text_file, "--model.arch", "hnet", *line)
    assert out.returncode == 0, out.stderr
    return folder


def test_a_trained_run(trained: Path) -> None:
    out = treadle("report", trained)
    assert out.returncode == 0 and "report.html written" in out.stdout and "no network" in out.stdout
    assert "measuring text of " in out.stderr and "measuring" not in out.stdout
    html = unescape((trained / "report.html").read_text("utf-8"))
    assert "default-src 'none'" in html and not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", html)
    (run,) = data_of(trained / "report.html")["runs"]
    assert run["status"] == "finished" and run["planned"]["rows"][0]["label"] == "parameters"
    assert run["planned"]["rows"][0]["cells"]["ratio"] == 1.0 and len(run["samples"]) == 2
    assert {"train.max_steps", "model.hidden_sizes"} <= set(run["changed"]) and "optim.adam_beta2" not in run["changed"]
    for passage in run["text"]:
        assert len(passage["tokens"]) == len(passage["losses"]) and passage["losses"][0] is None and "".join(passage["tokens"]).strip()
        assert passage["chunks"][0][0] == 0 and max(passage["chunks"][0]) < len(passage["tokens"]) and passage["per_chunk"][0] >= 1


def test_losses_of_tokens_are_those_of_an_evaluation(trained: Path) -> None:
    loaded = load_run(str(trained))
    split = held_out(loaded.config, loaded.tokenizer, None)["validation"]
    metrics = evaluator_of(loaded).evaluate(split, 1, 1)
    (batch,) = split.in_sequence(1, 1)
    ids, losses = token_losses(loaded.model, batch)
    known = [loss for loss in losses if loss is not None]
    assert metrics is not None and len(known) == metrics["labels"]
    torch.testing.assert_close(sum(known) / len(known), metrics["loss"], rtol=1e-3, atol=1e-3)  # the run's own may be in bf16
    assert ids[:-1] == batch.input_ids[0].tolist() and ids[-1] == int(batch.labels[0, -1])


def test_without_a_model(trained: Path, tmp_path: Path) -> None:
    assert "--no-model" in write_report([str(trained)], tmp_path / "plain.html", model=False)[0]
    assert data_of(tmp_path / "plain.html")["runs"][0]["text"] == []
    said = write_report([str(write_run(tmp_path / "run"))], tmp_path)
    assert "no checkpoint yet" in said[0] and (tmp_path / "report.html").is_file()


def test_a_recipe_is_made_once_and_one_of_another_version_leaves_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, made = write_run(tmp_path / "run"), []
    real = planning.recipe_of
    monkeypatch.setattr(planning, "recipe_of", lambda tables: made.append(tables) or real(tables))
    write_report([str(folder)], tmp_path / "one.html", model=False)
    (run,) = data_of(tmp_path / "one.html")["runs"]
    assert len(made) == 1 and run["planned"]["rows"] and "tokenizer.name" in run["changed"]
    with (folder / "config.toml").open("a", encoding="utf-8") as stream:
        stream.write("of_the_future = 1\n")
    write_report([str(folder)], tmp_path / "one.html", model=False)
    (run,) = data_of(tmp_path / "one.html")["runs"]
    assert run["planned"]["rows"] == [] and "of_the_future" in run["planned"]["note"] and run["changed"] == []


def test_what_is_no_run_is_refused_with_what_to_name(tmp_path: Path) -> None:
    out = treadle("report", tmp_path / "missing")
    assert out.returncode == 2 and "is no folder of a run, a sweep or a suite" in out.stderr and "Traceback" not in out.stderr
    with pytest.raises(InputError, match="treadle train makes one"):
        write_report([str(tmp_path)], None)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(InputError, match="write it anew"):
        write_report([str(tmp_path)], None)


def test_characters_share_a_piece_and_ends_are_marked() -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("naïve 🧵!").tolist()
    pieces, of_piece = pieces_of(tokenizer, ids)
    assert "".join(pieces) == "naïve 🧵!" and len(pieces) == 8
    assert of_piece == [0, 1, 2, 2, 3, 4, 5, 6, 6, 6, 6, 7]


def test_thousands_of_steps_of_many_runs_stay_small(tmp_path: Path) -> None:
    places = [str(write_run(tmp_path / f"run{number}", 5000, f"run{number}")) for number in range(6)]
    write_report(places, tmp_path / "all.html", model=False)
    assert (tmp_path / "all.html").stat().st_size < 2_500_000
    for run in data_of(tmp_path / "all.html")["runs"]:
        assert max(run["columns"]["loss"]["values"][len(run["columns"]["loss"]["values"]) // 4 :]) > 5  # the spike at step 2500
        assert len(run["evals"]) == 4 and run["text_note"]


def test_mixers_are_named_where_they_are_not_plain_attention(tmp_path: Path) -> None:
    kinds = (["attention"], ["gdn"], ["gated_deltanet", "full"], ["mine.py:Mixer"])
    places = [str(write_run(tmp_path / f"{number}", name=f"{number}", model={"layer_types": kind})) for number, kind in enumerate(kinds)]
    write_report(places, tmp_path / "all.html", model=False)
    data = data_of(tmp_path / "all.html")
    named = ["transformer", "transformer (gated_deltanet)", "transformer (gated_deltanet, full_attention)", "transformer (mine.py:Mixer)"]
    assert [row["cells"]["architecture"] for row in data["boards"][0]["rows"]] == named and data["lead"] == ", ".join(named)


def test_nothing_that_a_run_says_ends_the_script(tmp_path: Path) -> None:
    write_report([str(write_run(tmp_path / "run"))], tmp_path / "one.html", model=False)
    html = (tmp_path / "one.html").read_text("utf-8")
    assert html.count("</script>") == 2 and "<!--" not in html
    assert data_of(tmp_path / "one.html")["runs"][0]["samples"][-1]["text"] == f"said at 40: {ENDS_A_SCRIPT}"


def test_a_sweep_and_a_suite(tmp_path: Path) -> None:
    cells = []
    for seed in (0, 1):
        for rate in ("1e-3", "3e-3"):
            folder = write_run(tmp_path / "grid" / f"lr={rate}__seed={seed}")
            cells.append({"point": {"lr": rate}, "seed": seed, "folder": f"elsewhere/grid/{folder.name}", "metric": "bpb", "step": 40, "failed": "",
                          "value": 2.0 + seed + float(rate), "cpu_seconds": 4.0})  # fmt: skip
    (tmp_path / "grid" / "sweep.json").write_text(json.dumps({"cells": cells}))
    write_report([str(tmp_path / "grid")], None, model=False)
    data = data_of(tmp_path / "grid" / "report.html")
    (board,) = data["boards"]
    assert [row["label"] for row in board["rows"]] == ["lr=1e-3", "lr=3e-3"] == [run["label"] for run in data["runs"]]
    assert board["rows"][0]["cells"]["value"] == {"mean": 2.501, "low": 2.001, "high": 3.001} and "4 of 4" in board["note"]
    assert [row["colour"] for row in board["rows"]] == [0, 1] == [row["colour"] for row in board["bars"]["rows"]]
    assert board["columns"][0]["unit"] == "mean, range over seeds" and "`" not in data["planner_note"]
    assert "range over seeds" in svg_bars("loss", [("a", 2.0, 1.0, 3.0)]) and "seeds" not in svg_bars("loss", [("a", 2.0, 2.0, 2.0), ("b", 1.0, 1.0, 1.0)])
    for cell in cells:  # the best point is another one now: its colour stays that of its curve
        cell["value"] = -cell["value"] if cell["point"]["lr"] == "3e-3" else cell["value"]
    (tmp_path / "grid" / "sweep.json").write_text(json.dumps({"cells": cells}))
    write_report([str(tmp_path / "grid")], None, model=False)
    (board,) = data_of(tmp_path / "grid" / "report.html")["boards"]
    assert [(row["label"], row["colour"]) for row in board["rows"]] == [("lr=3e-3", 1), ("lr=1e-3", 0)]
    suite = {"name": "two", "budget": {"bytes": 1000, "seeds": 2}, "metric": "bpb", "done": False, "cost": {"cpu_seconds": 9.0, "of_search": 4.0},
             "columns": [{"key": "bpb", "title": "bits per byte", "unit": "", "lower_is_better": True}],
             "rows": [{"label": "dense", "learning_rate": 0.01, "parameters": 1000, "cells": {"bpb": {"mean": 2.0, "low": 1.9, "high": 2.1}},
                       "runs": [cells[0]["folder"]], "paired": None},
                      {"label": "hnet", "learning_rate": 0.02, "parameters": 1010, "cells": {}, "runs": [],
                       "paired": {"against": "dense", "difference": -0.1, "low": -0.2, "high": 0.0}}],
             "scaling": [{"label": "dense", "points": [{"parameters": 100, "value": 2.0}, {"parameters": 400, "value": 1.0}],
                          "fit": {"exponent": 0.5, "low": 0.4, "high": 0.6, "factor": 20.0}}],
             "jobs": [{"state": "done"}, {"state": "waiting"}]}  # fmt: skip
    (tmp_path / "grid" / "suite.json").write_text(json.dumps(suite))
    write_report([str(tmp_path / "grid")], None, model=False)
    (board,) = data_of(tmp_path / "grid" / "report.html")["boards"]
    assert "1,000 bytes of text and has 2 seeds" in board["note"] and "1 of 2 jobs done" in board["note"]
    assert [column["key"] for column in board["columns"]] == ["bpb", "paired", "learning_rate", "parameters"]
    assert board["scaling"][0]["curve"]["y"][0] == pytest.approx(2.0) and board["scaling"][0]["curve"]["y"][-1] == pytest.approx(1.0)
    assert "exponent 0.500 (0.400 to 0.600)" in board["scaling_note"]
    aborted = {**suite, "rows": [{**row, "runs": []} for row in suite["rows"]],
               "jobs": [{"label": "hnet, seed 0", "state": "failed", "problem": "error: no such key"}, {"label": "dense, seed 0", "state": "waiting"}]}
    (tmp_path / "aborted").mkdir()
    (tmp_path / "aborted" / "suite.json").write_text(json.dumps(aborted))
    write_report([str(tmp_path / "aborted")], None, model=False)
    data = data_of(tmp_path / "aborted" / "report.html")
    assert data["boards"][0]["problems"] == ["hnet, seed 0: error: no such key"] and "why" in data["lead"]
