"""A whole experiment with byte models, offline, from a folder of text files: prepare, train, stop, resume, evaluate, generate,
compare."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.conftest import make_text
from tests.conftest import treadle as command
from treadle.errors import InputError
from treadle.reporting.compare import compare

SMALL = ("--num_blocks", "[[1,0,1],[1]]", "--hidden_sizes", "24,32")


def ok(*words: object) -> str:
    done = command(*words)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on one prepared folder; one of them stopped on the way and continued."""
    home = tmp_path_factory.mktemp("experiment")
    (home / "texts").mkdir()
    for number in range(150):
        (home / "texts" / f"{number:03d}.txt").write_text(make_text(6, seed=number), encoding="utf-8")
    told = ok("data", "prepare", home / "texts", "--tokenizer", "byte", "--max-samples", 120, "--test-fraction", 0.1,
              "--validation-fraction", 0.1, "--seq-len", 64, "--output", home / "prepared")  # fmt: skip
    assert "test:" in told and "sequences of 64 tokens" in told
    common = ("--data.path", home / "prepared", "--seq_len", 64, "--batch_size", 4, "--eval_steps", 5, "--save_steps", 5,
              "--sample_tokens", 8, "--report_to", "csv,jsonl,tensorboard")  # fmt: skip
    ok("train", "hgrn_bit", *common, "--hidden_size", 24, "--num_layers", 1, "--max_steps", 10, "--output_dir", home / "flat")
    ok("train", "hnet", *common, *SMALL, "--max_steps", 5, "--output_dir", home / "deep")
    assert "Resumed from step 5" in ok("train", "hnet", *common, *SMALL, "--max_steps", 10, "--output_dir", home / "deep")
    return home


def test_statistics_are_saved(experiment: Path) -> None:
    table = json.loads((experiment / "prepared" / "statistics.json").read_text())
    assert set(table) == {"train", "validation", "test"} and sum(part["samples"] for part in table.values()) == 120
    for part in table.values():
        assert part["bytes"] > 0 and part["sequences"] > 0 and part["length_percentiles"]["50"] > 0


def test_a_run_leaves_everything(experiment: Path) -> None:
    run = experiment / "deep"
    with (run / "training_log.csv").open() as log:
        rows = list(csv.DictReader(log))
    wanted = {"step", "loss", "bpb", "perplexity", "learning_rate", "grad_norm", "tokens_per_second", "boundary_rate_0",
              "tokens_per_chunk_0", "ratio_loss_0"}  # fmt: skip
    assert wanted <= set(rows[0]) and rows[-1]["step"] == "10" and len({row["step"] for row in rows}) == len(rows)
    with (run / "eval_log.csv").open() as log:
        assert [row["step"] for row in csv.DictReader(log)] == ["5", "10"]
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    assert list((run / "tensorboard").iterdir()) and list((run / "samples").iterdir()) and (run / "checkpoints" / "best.json").is_file()


def test_evaluation_on_the_last_test(experiment: Path) -> None:
    shown = ok("eval", experiment / "deep", "--split", "test", "--samples", 2)
    assert "bigram" in shown and "< 1.5" in shown and "* outside the customary range" in shown
    results = json.loads((experiment / "deep" / "results" / "evaluation_results.json").read_text())
    assert results["data"] == "test split of the run" and results["baselines"]["uniform"]["bpb"] == pytest.approx(8.0)
    assert {"utf8_validity", "distinct_1", "distinct_2"} <= set(results["metrics"])
    assert (experiment / "deep" / "results" / "generations.txt").read_text().count("===") == 2
    done = command("eval", experiment / "deep", "--split", "tset")
    assert done.returncode == 2 and "held out validation, test and no tset split" in done.stderr


def test_compare(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = experiment / "table.json"
    shown = ok("compare", experiment / "flat", f"{experiment / 'deep'}@all", "--output", out).splitlines()
    assert len(shown) == 6 and "bits/byte" in shown[0] and sum(" *" in line for line in shown[1:4]) == 1 and shown[4] == "* the best"
    rows = json.loads(out.read_text())["rows"]
    assert [row["step"] for row in rows] == [10, 5, 10] and [row["architecture"] for row in rows] == ["hgrn_bit", "hnet", "hnet"]
    assert rows[1]["bpb"] > rows[2]["bpb"] and rows[2]["tokens_seen"] == 2 * rows[1]["tokens_seen"]
    assert all(row["parameters"] > 0 and row["flops_per_byte"] > 0 and row["state_bytes"] > 0 for row in rows)
    (experiment / "other.txt").write_text(make_text(300, seed=9), encoding="utf-8")
    ok("train", experiment / "other.txt", "--tokenizer", "byte", "--model.arch", "hgrn_bit", "--hidden_size", 16, "--num_layers", 1,
       "--seq_len", 64, "--batch_size", 2, "--max_steps", 1, "--output_dir", experiment / "other")  # fmt: skip
    done = command("compare", experiment / "flat", experiment / "other")
    assert done.returncode == 2 and "--data FILE" in done.stderr
    with monkeypatch.context() as patch, pytest.raises(InputError, match="different text"):  # said before anything is measured
        patch.setattr("treadle.reporting.compare.load_run", lambda *_: pytest.fail("a model was loaded"))
        compare([str(experiment / "flat"), str(experiment / "other")])
    assert len(ok("compare", experiment / "flat", experiment / "other", "--data", experiment / "other.txt").splitlines()) == 4


@pytest.mark.slow
def test_a_stored_generation_config_gives_the_defaults(experiment: Path) -> None:
    run = experiment / "flat"
    prompt = (run, "--prompt", "one")
    usual = ok("generate", *prompt, "--max-tokens", 12)
    path = run / "generation_config.json"
    path.write_text(json.dumps({"max_new_tokens": 12, "top_k": 3, "temperature": 0.5, "pad_token_id": 0}))
    try:
        assert ok("generate", *prompt) == ok("generate", *prompt, "--max-tokens", 12, "--top-k", 3, "--temperature", 0.5)
        assert ok("generate", *prompt, "--top-k", 50, "--temperature", 1.0) == usual
        ok("export", run, "--output", experiment / "exported")
        assert ok("generate", experiment / "exported", "--prompt", "one") == ok("generate", *prompt)
        path.write_text(json.dumps({"top_k": "many"}))
        done = command("generate", *prompt)
        assert done.returncode == 2 and "top_k = 'many' is no whole number" in done.stderr
    finally:
        path.unlink()
    done = command("generate", experiment / "nothing")
    assert done.returncode == 2 and "does not exist" in done.stderr
