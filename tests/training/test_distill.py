"""Distillation: the losses, what each stage changes, whole runs from the command line and as a library."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import treadle
from tests.conftest import flags, make_text
from tests.conftest import treadle as command
from tests.several import run_in
from tests.training.test_resume import start
from treadle.checkpoint.layout import checkpoint_name
from treadle.checkpoint.reader import Checkpoint
from treadle.data.batch import Batch
from treadle.distillation import stage_steps
from treadle.errors import ConfigError
from treadle.models.base import Model
from treadle.objectives.distill import MatchHidden, MatchLogits, MatchMixers, make_objective
from treadle.objectives.settings import DistillSettings
from treadle.ops.divergence import linear_divergence, linear_divergence_reference
from treadle.training.trainer import Trainer

NO_TEXT: Any = SimpleNamespace(tokenizer=None)  # a dataset that says nothing of tokens

SHAPE = {"vocab_size": 256, "hidden_size": 32, "num_layers": 2, "num_heads": 2}


def teacher(**keys: Any) -> Model:
    return treadle.build("shc", seed=5, **{**SHAPE, **keys})


def rows(count: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed))


def test_the_divergence_is_the_plain_one_with_its_gradients() -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.where(torch.rand(3, 50, generator=g) < 0.2, -100, 1)
    theirs, their_weight = torch.randn(3, 50, 12, generator=g), torch.randn(301, 12, generator=g)
    found = []
    for function in (linear_divergence, linear_divergence_reference):
        hidden = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        weight = torch.randn(301, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
        total = function(hidden, weight, theirs, their_weight, labels, 1.7)
        total = total[0] if isinstance(total, tuple) else total
        (total * 3).backward()
        found.append((total.detach(), hidden.grad, weight.grad))
    for ours, plain in zip(*found):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    same = torch.randn(2, 9, 12, generator=g)
    total, agreed = linear_divergence(same, their_weight, same, their_weight, labels[:2, :9], 2.0)
    assert abs(float(total)) < 1e-4 and int(agreed) == int((labels[:2, :9] != -100).sum())


@pytest.mark.parametrize("kind", [MatchMixers, MatchHidden, MatchLogits])
def test_repeating_a_batch_changes_no_loss_per_place(kind: Any) -> None:
    """Along B; and along T as documents packed into longer rows."""
    master = teacher()
    student = treadle.student_of(master, seed=1)
    objective = kind(master)
    objective.prepare(student, NO_TEXT, torch.device("cpu"))
    ids = rows(2, 16)
    docs = torch.zeros_like(ids)
    variants = [Batch.for_training(ids, docs), Batch.for_training(torch.cat([ids, ids]), torch.cat([docs, docs])),
                Batch.for_training(torch.cat([ids, ids], 1), torch.cat([docs, docs + 1], 1))]  # fmt: skip
    found = []
    for batch in variants:
        parts = objective(student, batch).losses
        found.append({name: float(part.total.detach()) / batch.counts[part.unit] for name, part in parts.items()})
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5, abs=1e-6)


def test_a_student_starts_with_the_teachers_weights() -> None:
    master = teacher(num_layers=3, routing="cayley_mixture")
    student = treadle.student_of(master, local_window=0)
    own, theirs = student.named_weights(), master.named_weights()
    assert set(theirs) <= set(own) and all(torch.equal(own[n], t) for n, t in theirs.items())
    assert student.config.local_window == 0 and student.config.routing == "cayley_mixture"
    plain = treadle.build("transformer", **SHAPE)
    assert treadle.student_of(plain).config.num_streams == 1
    assert set(plain.named_weights()) <= set(treadle.student_of(plain).named_weights())


def test_each_stage_changes_what_it_should() -> None:
    master = teacher()
    batch = Batch.for_training(rows())
    rules = {"mixer": lambda name: ".attention." in name, "hidden": lambda name: not name.startswith("norm.")}
    for stage, rule in rules.items():
        student = treadle.student_of(master, seed=1).train()
        objective = make_objective(DistillSettings(stage=stage), master)
        objective.prepare(student, NO_TEXT, torch.device("cpu"))
        parts = objective(student, batch)
        sum(part.total for part in parts.losses.values()).backward()
        for name, p in student.named_parameters():
            assert (p.grad is not None) == p.requires_grad, name  # a trained parameter without gradient would stop DDP
            assert p.requires_grad == rule(name), name
    assert all(p.grad is None for p in master.parameters()) and not master.training


def test_the_same_weights_match_perfectly() -> None:
    """A student that is its teacher has nothing to learn."""
    master = teacher()
    copy = teacher()
    batch = Batch.for_training(rows())
    for stage in ("mixer", "hidden"):
        objective = make_objective(DistillSettings(stage=stage), master)
        objective.prepare(copy, NO_TEXT, torch.device("cpu"))
        assert float(next(iter(objective(copy, batch).losses.values())).total.detach()) < 1e-6
    parts = make_objective(DistillSettings(stage="logits"), master)(copy, batch)
    assert abs(float(parts.losses["kd"].total.detach())) < 1e-3 and float(parts.stats["agreement"]) == 1


def test_what_cannot_be_distilled_says_so() -> None:
    master = teacher()
    with pytest.raises(ConfigError, match="--stages logits"):
        make_objective(DistillSettings(stage="mixer"), master).prepare(teacher(num_layers=3), NO_TEXT, torch.device("cpu"))
    with pytest.raises(ConfigError, match="vocab_size"):
        MatchLogits(master).prepare(teacher(vocab_size=300), NO_TEXT, torch.device("cpu"))
    with pytest.raises(ConfigError, match="--stages logits"):
        objective = MatchHidden(master)
        objective(treadle.build("transformer", **SHAPE), Batch.for_training(rows()))
    with pytest.raises(ConfigError, match="--max_steps"):
        stage_steps(DistillSettings(), None)
    with pytest.raises(ConfigError, match="--mixer_steps"):
        stage_steps(DistillSettings(mixer_steps=9), 9)
    assert stage_steps(DistillSettings(), 40) == [("mixer", 10), ("logits", 30)]
    for keys in ({"stages": ["logits", "mixer"]}, {"stages": []}, {"alpha_ce": 0, "alpha_kd": 0}):
        with pytest.raises(ConfigError, match=r"stages|alpha"):
            DistillSettings(**keys)


# ---- whole runs ----


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(make_text())
    return path


@pytest.fixture(scope="module")
def trained(text: Path) -> Path:
    """A teacher that the command line trained."""
    keys = flags(max_steps=30, batch_size=4, seq_len=32, tokenizer__name="byte", hidden_size=32, num_layers=2, num_heads=2,
                 eval_steps=30, eval_rows=8, lr=3e-3)  # fmt: skip
    out = command("train", text, "--model.arch", "shc", "--output_dir", text.parent / "teacher", *keys)
    assert out.returncode == 0, out.stderr
    return text.parent / "teacher"


def run(trained: Path, folder: Path, **keys: object) -> list[object]:
    wanted = {"max_steps": 24, "batch_size": 4, "eval_steps": 12, "eval_rows": 8, "save_steps": 4, "logging_steps": 1, **keys}
    return ["distill", "--teacher", trained, "--output_dir", folder, *flags(**wanted)]


def test_from_the_command_line_killed_and_continued(trained: Path, tmp_path: Path) -> None:
    whole = command(*run(trained, tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    assert "Stage mixer: 6 steps" in whole.stdout and "Stage logits: 18 steps" in whole.stdout
    found = json.loads((tmp_path / "whole" / "results" / "distillation.json").read_text())
    assert 0 < found["agreement"] <= 1 and found["student"]["state_bytes"]["1024"] == found["student"]["state_bytes"]["8192"]
    assert found["teacher"]["state_bytes"]["8192"] > 8 * found["student"]["state_bytes"]["8192"]
    for stage, rows_needed in ((tmp_path / "cut" / "stages" / "mixer", 4), (tmp_path / "cut", 9)):
        import sys
        import time

        process = start([sys.executable, "-m", "treadle", *map(str, run(trained, tmp_path / "cut"))])
        deadline = time.monotonic() + 60
        log = stage / "metrics.jsonl"
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_bytes().count(b"\n") >= rows_needed:
                break
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    again = command(*run(trained, tmp_path / "cut"))
    assert again.returncode == 0, again.stderr
    for place, step in (("stages/mixer", 6), (".", 18)):
        a, b = (Checkpoint(tmp_path / name / place / "checkpoints" / checkpoint_name(step)) for name in ("whole", "cut"))
        for member in ("model.safetensors", "optimizer.safetensors"):
            assert a.manifest["files"][member] == b.manifest["files"][member]
    rows_of_mixer = [json.loads(r) for r in (tmp_path / "cut" / "stages" / "mixer" / "metrics.jsonl").read_text().splitlines()]
    errors = [row["mixer_error_1"] for row in rows_of_mixer if "mixer_error_1" in row]
    assert len(errors) == 6 and all(0 <= e < 1 for e in errors) and "bpb" not in rows_of_mixer[0]
    generated = command("generate", tmp_path / "cut", "--prompt", "the", "--max-new-tokens", 5)
    assert generated.returncode == 0 and generated.stdout.startswith("the")


def test_any_architecture_learns_from_logits_and_what_is_wrong_is_said(trained: Path, tmp_path: Path) -> None:
    plain = run(trained, tmp_path / "plain", stages="logits", model__arch="transformer", hidden_size=16)
    out = command(*plain)
    assert out.returncode == 0 and "Stage mixer" not in out.stdout, out.stderr
    rows = [json.loads(r) for r in (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss_kd"] > 0 and 0 <= rows[0]["agreement"] <= 1
    missing = command("distill", "--max_steps", 3)
    assert missing.returncode == 2 and "--teacher" in missing.stderr
    gone = command("distill", "--teacher", tmp_path / "gone", "--max_steps", 3)
    assert gone.returncode == 2 and "does not exist" in gone.stderr


@pytest.mark.slow
def test_two_processes_from_the_command_line(trained: Path, tmp_path: Path) -> None:
    one = command(*run(trained, tmp_path / "one", global_batch_size=4))
    two = command(*run(trained, tmp_path / "two", batch_size=2, global_batch_size=4, run__devices=2, parallel__mode="fsdp"))
    assert one.returncode == two.returncode == 0, two.stderr
    assert two.stdout.count("Stage logits") == 1
    for place in ("stages/mixer", "."):
        a, b = ([json.loads(r) for r in (tmp_path / n / place / "metrics.jsonl").read_text().splitlines()] for n in ("one", "two"))
        ours, theirs = ([row["loss"] for row in rows if "split" not in row] for rows in (a, b))
        assert ours == pytest.approx(theirs, rel=1e-5) and len(ours) > 5


def shared_training(folder: str, path: str, mode: str) -> list[float]:
    data = treadle.Dataset.load(path, tokenizer="byte", seq_len=32)
    master = teacher()
    found: list[float] = []
    for stage in ("mixer", "hidden", "logits"):
        config = treadle.TrainConfig(max_steps=4, batch_size=2, global_batch_size=8, logging_steps=1, precision="fp32", stage=stage,
                                     output_dir=f"{folder}/{mode}-{stage}", **{"parallel.mode": mode})  # fmt: skip
        student = treadle.student_of(master, seed=2)
        Trainer(student, data, None, config, make_objective(config.distill, master)).train()
        lines = Path(f"{folder}/{mode}-{stage}/metrics.jsonl").read_text().splitlines()
        found += [json.loads(line)["loss"] for line in lines]
    return found


def test_all_stages_are_the_same_for_several_processes(text: Path, tmp_path: Path) -> None:
    alone = shared_training(str(tmp_path / "alone"), str(text), "none")
    for mode in ("ddp", "fsdp"):
        several = run_in(2, shared_training, str(tmp_path / "several"), str(text), mode)[0]
        assert several == pytest.approx(alone, rel=1e-5) and len(alone) == 12


def test_as_a_library(text: Path, tmp_path: Path) -> None:
    data = treadle.Dataset.load(text, tokenizer="byte", seq_len=32)
    master = teacher()
    student = treadle.student_of(master, local_window=4)
    config = treadle.TrainConfig(max_steps=8, batch_size=4, stages=["mixer", "logits"], mixer_steps=3, alpha_kd=1.0,
                                 alpha_ce=0.0, temperature=1.5, output_dir=str(tmp_path / "r"))  # fmt: skip
    summary = treadle.DistillationTrainer(master, student, data, config=config).train()
    assert summary["step"] == 5 and (tmp_path / "r" / "stages" / "mixer" / "summary.json").exists()
    student.save_pretrained(tmp_path / "saved")
    again = treadle.from_pretrained(tmp_path / "saved").named_weights()
    assert all(torch.equal(t, again[n]) for n, t in student.named_weights().items())


def test_a_compressed_cache_costs_little(trained: Path) -> None:
    """3.3 times smaller and at most 0.05 nats worse, before any further training."""
    model, tokenizer = treadle.load(trained)
    data = treadle.Dataset.load(trained.parent / "story.txt", tokenizer="byte", seq_len=32)
    held = treadle.Dataset.load(trained.parent / "story.txt", tokenizer="byte", seq_len=32, split="validation")
    batches = list(data.in_sequence(16, 128))
    small = treadle.compress_cache(model, batches, int(0.6 * 32))
    losses = [treadle.Evaluator(m, tokenizer).evaluate(held, rows=64)["loss"] for m in (model, small)]
    assert losses[1] - losses[0] <= 0.05
    assert model.state_bytes(1, 1024) / small.state_bytes(1, 1024) >= 3.3


@pytest.mark.slow
def test_quality_on_real_text(tmp_path: Path) -> None:
    """A teacher of the bundled text and its students, from the command line (some minutes)."""
    keys = flags(max_steps=500, batch_size=16, tokenizer__name="byte", seq_len=128, hidden_size=96, num_layers=3, num_heads=3,
                 eval_steps=500, eval_rows=50, lr=3e-3, precision="fp32", sample_tokens=0)  # fmt: skip
    out = command("train", "austen", "--model.arch", "shc", "--output_dir", tmp_path / "teacher", *keys, timeout=900)
    assert out.returncode == 0, out.stderr
    found = {}
    untaught = {"stages": "logits", "carry_weights": "false", "lr": 3e-3}
    for name, more in {"student": {}, "pure": {"local_window": 0}, "random": untaught}.items():
        wanted = {"max_steps": 160, "batch_size": 16, "eval_steps": 160, "eval_rows": 50, "save_steps": 160, "lr": 1e-3, **more}
        if name != "random":
            wanted["mixer_steps"] = 60
        words = [word for key, value in wanted.items() for word in (f"--{key}", value)]
        out = command("distill", "--teacher", tmp_path / "teacher", "--output_dir", tmp_path / name, *words, timeout=900)
        assert out.returncode == 0, out.stderr
        found[name] = json.loads((tmp_path / name / "results" / "distillation.json").read_text())
        print(name, found[name]["student"]["loss"], found[name]["teacher"]["loss"], found[name]["agreement"])
    gaps = {name: table["student"]["loss"] - table["teacher"]["loss"] for name, table in found.items()}
    assert gaps["student"] <= 0.05 and found["student"]["agreement"] >= 0.85, (gaps, found["student"]["agreement"])
    assert gaps["pure"] <= 0.15 and gaps["random"] - gaps["student"] >= 0.5, gaps
