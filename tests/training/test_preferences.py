"""Learning from preferences as whole runs: from the command line, killed and continued, in several processes, with adapters."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

import treadle
from tests.conftest import flags, make_text
from tests.conftest import treadle as command
from tests.several import run_in
from tests.training.test_resume import rows_of, same_end, start
from treadle.data.preferences import Preferences
from treadle.data.settings import DataSettings
from treadle.objectives.dpo import DirectPreference
from treadle.objectives.settings import PreferenceSettings
from treadle.text.base import Tokenizer
from treadle.text.settings import TokenizerSettings
from treadle.training.trainer import Trainer

PAIRS = 40
KEYS = {"seq_len": 160, "max_steps": 12, "batch_size": 4, "save_steps": 4, "logging_steps": 1, "eval_steps": 6, "validation_fraction": 0.2,
        "lr": 1e-3, "precision": "fp32", "eval_rows": 100}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in the three forms that there are, of which the chosen answers say yes, and a model trained on a text."""
    folder = tmp_path_factory.mktemp("preferences")
    lines = []
    for n in range(PAIRS):
        prompt, good, bad = f"Is {n} a number?", f"Yes, {n} is one.", "No" + " no" * (n % 5)
        asked, told = {"role": "user", "content": prompt}, [{"role": "assistant", "content": text} for text in (good, bad)]
        rows: list[dict[str, Any]] = [
            {"prompt": prompt, "chosen": good, "rejected": bad},
            {"prompt": [asked], "chosen": told[:1], "rejected": told[1:]},
            {"chosen": [asked, told[0]], "rejected": [asked, told[1]]},
        ]
        lines.append(json.dumps(rows[n % 3]))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "story.txt").write_text(make_text())
    out = command("train", folder / "story.txt", "--output_dir", folder / "base", *flags(max_steps=10, eval_steps=10, dropout=0.1, style="gpt2",
                                                                                      max_position_embeddings=160))  # fmt: skip
    assert out.returncode == 0, out.stderr
    return folder


def line(files: Path, folder: Path, **keys: object) -> list[object]:
    wanted = {**KEYS, "objective": "dpo", **keys}
    shape = ("hidden_size", "num_layers", "num_heads", "tokenizer.name")  # follow from --from
    given = [part for name, value in {**dict(zip(flags()[::2], flags()[1::2])), **{f"--{k}": str(v) for k, v in wanted.items()}}.items()
             if name[2:] not in shape for part in (name, value)]  # fmt: skip
    return ["train", files / "pairs.jsonl", "--from", files / "base", "--output_dir", folder, *given]


def test_preferences_from_the_command_line(files: Path, tmp_path: Path) -> None:
    out = command(*line(files, tmp_path / "r", max_steps=30, lr=3e-3, sample_tokens=4))
    assert out.returncode == 0, out.stderr
    assert "pair(s)" in out.stdout and "margin" in out.stdout
    rows = [json.loads(text) for text in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    trained, held = ([row for row in rows if ("split" in row) is wanted] for wanted in (False, True))
    # Dropout is on in training and off in the reference, so the first step is near log 2 and not at it.
    assert trained[0]["loss"] == pytest.approx(0.6931, abs=0.1) and trained[-1]["loss"] < 0.3
    assert held[-1]["accuracy"] == 1 and held[-1]["reward_margin"] > 1 and held[-1]["reward_margin"] == pytest.approx(
        held[-1]["chosen_reward"] - held[-1]["rejected_reward"], abs=1e-5)  # fmt: skip
    assert trained[-1]["reward_margin"] > 0 and 0 <= trained[-1]["accuracy"] <= 1
    config = tomllib.loads((tmp_path / "r" / "config.toml").read_text())
    assert config["task"]["reference"].startswith(str((files / "base").resolve())) and config["task"]["beta"] == 0.1
    assert len(config["task"]["reference_checksum"]) == 64 and config["data"]["dataset_class"] == "preferences"
    sample = next((tmp_path / "r" / "samples").iterdir()).read_text()
    assert sample.startswith("User:\nIs ") and "Assistant:" in sample  # a held-out prompt, answered
    measured = command("eval", tmp_path / "r")
    assert measured.returncode == 0, measured.stderr
    report = json.loads((tmp_path / "r" / "results" / "evaluation_results.json").read_text())
    for name in ("loss", "reward_margin", "accuracy"):
        assert report["metrics"][name] == pytest.approx(held[-1][name], abs=1e-5)
    assert report["baselines"]["reference"]["loss"] == pytest.approx(0.693147, abs=1e-6)


def test_killed_it_continues_bit_for_bit(files: Path, tmp_path: Path) -> None:
    whole = command(*line(files, tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    for rows in (6,):
        process = start([sys.executable, "-m", "treadle", *map(str, line(files, tmp_path / "killed"))])
        log, deadline = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and not (log.exists() and log.read_bytes().count(b"\n") >= rows):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    again = command("train", tmp_path / "killed")  # without --from: the run knows its reference
    assert again.returncode == 0, again.stderr
    same_end(tmp_path / "whole", tmp_path / "killed", 12)


def test_without_a_start_the_reference_is_drawn_again(files: Path, tmp_path: Path) -> None:
    """From random weights the reference is those of the seed; nothing of it is saved."""
    given = flags(**{**KEYS, "objective": "dpo", "max_steps": 4, "save_steps": 2, "eval_steps": 4})
    out = command("train", files / "pairs.jsonl", "--output_dir", tmp_path / "r", *given)
    assert out.returncode == 0, out.stderr
    config = tomllib.loads((tmp_path / "r" / "config.toml").read_text())
    assert config["task"]["reference_seed"] == config["run"]["seed"] and not config["task"].get("reference")
    before = rows_of(tmp_path / "r")
    assert before[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    measured = command("eval", tmp_path / "r")
    assert measured.returncode == 0, measured.stderr
    report = json.loads((tmp_path / "r" / "results" / "evaluation_results.json").read_text())
    assert report["metrics"]["reward_margin"] == pytest.approx(before[-1]["reward_margin"], abs=1e-5) and before[-1]["reward_margin"] != 0


def test_a_reference_that_is_gone_or_another_is_said(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "base", tmp_path / "base")
    given = [tmp_path / "base" if part == files / "base" else part for part in line(files, tmp_path / "r", max_steps=4)]
    assert command(*given).returncode == 0
    place = next((tmp_path / "base" / "checkpoints").glob("step-*"))
    place.rename(tmp_path / "elsewhere")
    gone = command("eval", tmp_path / "r")
    assert gone.returncode == 2 and "does not exist" in gone.stderr and "--task.reference" in gone.stderr
    other = command("train", files / "story.txt", "--output_dir", tmp_path / "other", *flags(max_steps=2, eval_steps=2, dropout=0.1, style="gpt2",
                                                                                           max_position_embeddings=160))  # fmt: skip
    assert other.returncode == 0
    shutil.copytree(next((tmp_path / "other" / "checkpoints").glob("step-*")), place)
    changed = command("train", tmp_path / "r", "--max_steps", 6)
    assert changed.returncode == 2 and "no longer what it was" in changed.stderr
    moved = command("train", tmp_path / "r", "--max_steps", 6, "--task.reference", tmp_path / "elsewhere", "--allow-change", "task")
    assert moved.returncode == 0, moved.stderr


def test_adapters_need_no_second_model(files: Path, tmp_path: Path) -> None:
    out = command(*line(files, tmp_path / "r", lora_rank=4, lr=1e-2, max_steps=20))
    assert out.returncode == 0, out.stderr
    held = [row for row in rows_of(tmp_path / "r") if "split" in row][-1]
    assert held["accuracy"] == 1 and held["reward_margin"] > 0.5
    measured = command("eval", tmp_path / "r")
    assert measured.returncode == 0, measured.stderr
    report = json.loads((tmp_path / "r" / "results" / "evaluation_results.json").read_text())
    assert report["metrics"]["reward_margin"] == pytest.approx(held["reward_margin"], abs=1e-3)  # merged, against the base by its path


# ---- several processes, micro-batches ----


def data_of(path: str) -> dict[str, Any]:
    wanted = DataSettings(path=path, seq_len=160, validation_fraction=0.2, dataset_class="preferences")
    return Preferences.splits_with(wanted, None, 0, TokenizerSettings(name="byte"), Tokenizer.load("byte"))


def trained(path: str, folder: str, mode: str, batch_size: int) -> list[list[float]]:
    """[loss, margin, accuracy, gradient norm] of each step, and of the evaluation."""
    splits, shape = data_of(path), {"vocab_size": 256, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
    config = treadle.TrainConfig(max_steps=4, batch_size=batch_size, global_batch_size=8, logging_steps=1, eval_steps=4, precision="fp32",
                                 output_dir=f"{folder}/{mode}-{batch_size}", sample_tokens=0, **{"parallel.mode": mode})  # fmt: skip
    policy, reference = treadle.build("transformer", seed=1, **shape), treadle.build("transformer", seed=2, **shape)
    objective = DirectPreference(PreferenceSettings(beta=0.2), reference)
    Trainer(policy, splits["train"], splits["validation"], config, objective).train()
    rows = rows_of(Path(f"{folder}/{mode}-{batch_size}"))
    return [[row["loss"], row["reward_margin"], row["accuracy"], row.get("grad_norm", 0.0)] for row in rows]


def test_processes_and_micro_batches_change_nothing(files: Path, tmp_path: Path) -> None:
    """Means are over the pairs of the whole step, however many a process or a micro-batch has."""
    path = str(files / "pairs.jsonl")
    alone = trained(path, str(tmp_path), "none", 8)
    assert len(alone) == 5 and 0 < alone[0][2] < 1
    for batch_size in (4, 1):
        for ours, other in zip(trained(path, str(tmp_path), "none", batch_size), alone):
            assert ours == pytest.approx(other, rel=1e-4, abs=1e-6)
    for mode in ("ddp", "fsdp"):
        for ours, other in zip(run_in(2, trained, path, str(tmp_path / "two"), mode, 2)[0], alone):
            assert ours == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_a_plan_counts_the_reference_and_makes_none(files: Path, tmp_path: Path) -> None:
    given = flags(seq_len=160, objective="dpo", hidden_size=256)
    found = {}
    for name, more in (("whole", []), ("adapters", ["--lora_rank", "4"])):
        out = command("plan", files / "pairs.jsonl", *given, *more, "--json")
        assert out.returncode == 0, out.stderr
        found[name] = json.loads(out.stdout)
    parameters = found["whole"]["parameters"]
    trained = 3 * 4 * (parameters - found["adapters"]["trained_parameters"])  # gradients and two moments
    saved = (found["whole"]["memory"]["total_gb"] - found["adapters"]["memory"]["total_gb"]) * 1e9
    assert trained + 3.5 * parameters < saved  # and the second model
    one_pass = (found["adapters"]["flops_per_token"] - 6 * found["adapters"]["trained_parameters"]) / 3
    assert found["whole"]["flops_per_token"] == pytest.approx(4 * one_pass)  # forward, backward twice that, and the reference's
