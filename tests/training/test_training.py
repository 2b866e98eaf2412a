"""Steps, schedules, optimisers and the trainer's promises."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import treadle
from treadle.checkpoint import writer
from treadle.checkpoint.layout import steps_in
from treadle.checkpoint.retention import best_step
from treadle.data.base import BatchPlan
from treadle.data.batch import Batch
from treadle.data.dataset import TokenDataset as Dataset
from treadle.errors import ConfigError, Diverged, OutOfMemory, SaveError
from treadle.models.base import ParameterRule, build
from treadle.objectives.base import ModelWithObjective
from treadle.objectives.next_token import NextToken
from treadle.training.callbacks.base import Callback
from treadle.training.context import Context
from treadle.training.optim import Optimizers, grouped
from treadle.training.schedule import learning_rate, warmup_steps
from treadle.training.settings import OptimSettings
from treadle.training.step import LossScale, Stepper
from treadle.training.trainer import Trainer


def tiny(seed: int = 0, **keys: Any):  # type: ignore[no-untyped-def]
    return build(
        "transformer", seed=seed, **{"vocab_size": 256, "hidden_size": 16, "num_layers": 2, "num_heads": 2, **keys}
    )


def stepper(model: Any, precision: str = "fp32", clip: float = 1.0, **keys: Any) -> Stepper:
    optimizers = Optimizers(model, OptimSettings(**keys))
    return Stepper(
        ModelWithObjective(model, NextToken()), optimizers, seed=0, precision=precision, max_grad_norm=clip, loss_weights={}
    )


def uneven(rows: int = 8, length: int = 12) -> Batch:
    """Rows with different amounts of padding."""
    ids = torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(1))
    doc_ids = torch.zeros(rows, length, dtype=torch.int64)
    for row in range(rows):
        doc_ids[row, length - row :] = -1
    return Batch.for_training(ids, doc_ids=doc_ids)


# ---- schedule ----


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_schedules(kind: str) -> None:
    settings = OptimSettings(learning_rate=1.0, lr_scheduler_type=kind, warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and max(rates) == 1.0
    assert rates[-1] == pytest.approx(1.0 if kind == "constant" else 0.1)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates[10:]))
    if kind == "wsd":
        assert rates[79] == 1.0 and rates[81] < 1.0
    halved = OptimSettings(**{**settings.model_dump(), "learning_rate": 0.5})
    assert [learning_rate(halved, s, 100) for s in range(100)] == [r / 2 for r in rates]
    floor = OptimSettings(learning_rate=1.0, lr_scheduler_type=kind, warmup_steps=0, min_lr=0.25)
    assert learning_rate(floor, 99, 100) == pytest.approx(1.0 if kind == "constant" else 0.25)


def test_warmup_defaults() -> None:
    assert warmup_steps(OptimSettings(), 1000) == 20 and warmup_steps(OptimSettings(), 10**6) == 2000
    assert warmup_steps(OptimSettings(warmup_steps=0), 1000) == 0
    assert learning_rate(OptimSettings(warmup_steps=0), 0, 1) > 0


# ---- optimisers ----


def test_parameter_groups_follow_rules_not_names() -> None:
    model = tiny(style="gpt2")
    groups = grouped(model, OptimSettings(weight_decay=0.1))
    decayed = {n for (_, decay), named in groups.items() if decay for n, _ in named}
    assert decayed == {n for n, p in model.named_parameters() if p.dim() >= 2}
    model.parameter_rules = lambda: {"embedding.weight": ParameterRule(2.0, False)}  # type: ignore[method-assign]
    groups = grouped(model, OptimSettings(weight_decay=0.1))
    assert [n for n, _ in groups[(2.0, 0.0)]] == ["embedding.weight"]
    optimizers = Optimizers(model, OptimSettings())
    optimizers.set_learning_rate(0.5)
    rates = {n: g["lr"] for o in optimizers.inner for g in o.param_groups for n in g["names"]}
    assert rates["embedding.weight"] == 1.0 and rates["norm.weight"] == 0.5


def test_adamw_is_the_paper() -> None:
    """Two steps of one scalar-like parameter against the equations of arXiv 1711.05101 in fp64."""
    model = tiny()
    run = stepper(model, clip=0.0, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9)
    name, p = "layers.0.mlp.up.weight", dict(model.named_parameters())["layers.0.mlp.up.weight"]
    w = p.detach().double().clone()
    m = v = torch.zeros_like(w)
    for step in range(2):
        rate = 0.01 * (step + 1)
        run.run(step, [uneven()], rate)
        g = p.grad.double()  # type: ignore[union-attr]
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        hat_m, hat_v = m / (1 - 0.8 ** (step + 1)), v / (1 - 0.9 ** (step + 1))
        w = w * (1 - rate * 0.1) - rate * hat_m / (hat_v.sqrt() + 1e-8)
    torch.testing.assert_close(p.detach().double(), w, atol=1e-6, rtol=1e-4)
    assert name


def test_muon_moves_the_blocks_matrices_orthogonally() -> None:
    model = tiny()
    run = stepper(model, name="muon", weight_decay=0.0)
    muon, adamw = run.optimizers.inner
    names = {n for g in muon.param_groups for n in g["names"]}
    assert names == {n for n, p in model.named_parameters() if n.startswith("layers.") and p.dim() == 2}
    before = model.layers[0].mlp.up.weight.detach().clone()  # type: ignore[union-attr]
    run.run(0, [uneven()], 0.01)
    change = model.layers[0].mlp.up.weight.detach() - before  # type: ignore[union-attr]
    values = torch.linalg.svdvals(change)
    assert (
        float(values[0] / values[min(7, len(values) - 1)]) < 5
    )  # Newton-Schulz brings singular values near one another
    assert adamw is not muon


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimiser_state_goes_by_name(name: str) -> None:
    one, two = stepper(tiny(), name=name), stepper(tiny(), name=name)
    for step in range(3):
        one.run(step, [uneven()], 0.01)
    two.strategy.module.model.load_weights(one.strategy.module.model.named_weights())
    two.optimizers.load_state_tensors({k: t.clone() for k, t in one.optimizers.state_tensors().items()})
    for run in (one, two):
        run.run(3, [uneven()], 0.01)
    for a, b in zip(one.strategy.module.parameters(), two.strategy.module.parameters()):
        assert torch.equal(a, b)
    with pytest.raises(Exception, match=r"other\.weight"):
        two.optimizers.load_state_tensors({"other.weight|exp_avg": torch.zeros(1)})


# ---- one step ----


def test_accumulation_is_weighted_by_tokens() -> None:
    """8 micro-batches of 1 row with unequal padding give the loss, norm and weights of one batch of 8."""
    whole, parts = stepper(tiny()), stepper(tiny())
    batch = uneven()
    a = whole.run(0, [batch], 0.01)
    b = parts.run(0, [batch.rows(i, i + 1) for i in range(8)], 0.01)
    torch.testing.assert_close(a.losses["next_token"], b.losses["next_token"], atol=1e-6, rtol=1e-6)
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-6) and a.counts == b.counts
    for (name, x), (_, y) in zip(whole.strategy.module.named_parameters(), parts.strategy.module.named_parameters()):
        torch.testing.assert_close(x.grad, y.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_clipping_scales_to_the_norm() -> None:
    run = stepper(tiny(), clip=0.01)
    run.run(0, [uneven()], 0.0)
    norm = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in run.strategy.module.parameters()))  # type: ignore[union-attr]
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_loss_weights_reach_the_gradient() -> None:
    half, full = stepper(tiny(), clip=0.0), stepper(tiny(), clip=0.0)
    half.loss_weights = {"next_token": 0.5}
    a, b = half.run(0, [uneven()], 0.0), full.run(0, [uneven()], 0.0)
    assert a.grad_norm == pytest.approx(b.grad_norm / 2, rel=1e-5)
    assert torch.equal(a.losses["next_token"], b.losses["next_token"])  # what is reported is not weighted


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("where", ["loss", "one gradient element"])
def test_nothing_non_finite_reaches_the_weights(precision: str, where: str) -> None:
    model = tiny()
    run = stepper(model, precision)
    before = {n: t.clone() for n, t in model.named_weights().items()}
    parameter = model.embedding.weight
    if where == "loss":
        hook = model.norm.register_forward_hook(lambda m, i, o: o * float("nan"))
    else:

        def poison(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            gradient[3, 3] = float("inf")
            return gradient

        hook = parameter.register_hook(poison)
    result = run.run(0, [uneven()], 0.01)
    hook.remove()
    assert result.skipped
    assert all(torch.equal(t, before[n]) for n, t in model.named_weights().items())
    assert not run.optimizers.state_tensors()
    assert not run.run(1, [uneven()], 0.01).skipped  # and training goes on


def test_the_loss_scale_adapts() -> None:
    scale = LossScale()
    scale.after(False)
    assert scale.scale == 2.0**13
    for _ in range(2000):
        scale.after(True)
    assert scale.scale == 2.0**14


def test_a_step_is_a_function_of_seed_and_step() -> None:
    """Dropout draws the same whatever happened before."""
    one, two = (stepper(tiny(style="gpt2", dropout=0.5)) for _ in range(2))
    torch.randn(100)
    a = one.run(5, [uneven()], 0.0).losses["next_token"]
    torch.manual_seed(99)
    b = two.run(5, [uneven()], 0.0).losses["next_token"]
    assert torch.equal(a, b) and not torch.equal(a, two.run(6, [uneven()], 0.0).losses["next_token"])


# ---- the trainer ----


@pytest.fixture()
def data(text_file: Path) -> dict[str, Dataset]:
    return {s: Dataset.load(str(text_file), "byte", 32, split=s) for s in ("train", "validation")}


def trainer(
    folder: Path, data: dict[str, Dataset], model: Any = None, callbacks: Any = (), resume: bool = False, **keys: Any
) -> Trainer:
    config = treadle.TrainConfig(**{"output_dir": str(folder), "max_steps": 6, "batch_size": 4, "logging_steps": 1,
                                    "report_to": ["jsonl", "csv"], "sample_tokens": 0, "learning_rate": 0.01, **keys})  # fmt: skip
    return Trainer(model or tiny(), data["train"], data["validation"], config, callbacks=callbacks, resume=resume)


@pytest.mark.parametrize(
    "keys", [{"num_train_epochs": 50.0}, {"gradient_accumulation_steps": 3}, {"num_train_epochs": 0.01}]
)
def test_max_steps_is_exact(tmp_path: Path, data: dict, keys: dict) -> None:
    summary = trainer(tmp_path, data, max_steps=10, **keys).train()
    assert summary["step"] == 10 and summary["status"] == "finished"


def test_epochs_end_exactly(tmp_path: Path, data: dict) -> None:
    """ceil(epochs N / G) steps; every row once an epoch, surplus rows of the last step masked."""
    rows = len(data["train"])
    made = trainer(tmp_path, data, max_steps=None, num_train_epochs=1.0, batch_size=64, eval_steps=1000)
    assert made.plan.max_steps == math.ceil(rows / 64)
    seen = []
    made.train()
    for step in range(made.plan.max_steps):
        seen += [r for _, r in data["train"].rows_of(step, BatchPlan(0, 64, rows=made.plan.rows_left(step)))]
    assert sorted(r for r in seen if r >= 0) == list(range(rows)) and seen.count(-1) == -rows % 64
    assert made.state.tokens == data["train"].sets[0].tokens()


def test_the_best_checkpoint_is_the_argmin_and_survives(tmp_path: Path, data: dict) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.2, 2.4])
    made = trainer(tmp_path, data, save_total_limit=1, eval_steps=1, save_steps=1)
    real = made.evaluator.evaluate
    made.evaluator.evaluate = lambda *a, **k: {**real(*a, **k), "loss": next(losses)}  # type: ignore[method-assign, dict-item]
    made.train()
    rows = list(csv.DictReader((tmp_path / "eval_log.csv").open()))
    best = min(rows, key=lambda r: float(r["loss"]))
    assert int(best["step"]) == 2 == best_step(tmp_path / "checkpoints") and steps_in(tmp_path / "checkpoints") == [
        6,
        2,
    ]


def test_a_lost_best_mark_is_restored(tmp_path: Path, data: dict) -> None:
    """Killed between the save and its mark: the next start knows the best step from the state."""
    made = trainer(tmp_path, data, max_steps=4, eval_steps=4)
    made.train()
    (tmp_path / "checkpoints" / "best.json").unlink()
    again = trainer(tmp_path, data, resume=True)
    again.load_checkpoint(tmp_path / "checkpoints" / "step-00000004")
    assert best_step(tmp_path / "checkpoints") == 4


def test_early_stopping_and_target(tmp_path: Path, data: dict) -> None:
    losses = iter([3.0, 2.0, 2.0, 1.99, 1.0, 0.5])
    made = trainer(tmp_path / "a", data, eval_steps=1, early_stopping_patience=2, early_stopping_threshold=0.05)
    real = made.evaluator.evaluate
    made.evaluator.evaluate = lambda *a, **k: {**real(*a, **k), "loss": next(losses)}  # type: ignore[method-assign, dict-item]
    assert made.train()["step"] == 4
    again = trainer(tmp_path / "a", data, resume=True, early_stopping_patience=2)
    again.load_checkpoint(tmp_path / "a" / "checkpoints" / "step-00000004")
    assert again.finished and again.train()["step"] == 4  # the same command does not go past it
    on = trainer(tmp_path / "a", data, resume=True)
    on.load_checkpoint(tmp_path / "a" / "checkpoints" / "step-00000004")
    assert not on.finished and on.train()["step"] == 6
    assert trainer(tmp_path / "b", data, eval_steps=2, target_loss=100.0).train()["step"] == 2


def test_diverging_stops_with_76(tmp_path: Path, data: dict) -> None:
    model = tiny()
    made = trainer(tmp_path, data, model, max_steps=50, nonfinite_limit=3)
    calls = []

    def poison(module: Any, inputs: Any, out: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return out * float("nan") if len(calls) > 2 else out

    model.norm.register_forward_hook(poison)
    with pytest.raises(Diverged) as caught:
        made.train()
    assert caught.value.exit_code == 76 and "--learning_rate" in str(caught.value)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    skipped = [e for e in events if e["event"] == "nonfinite"]
    assert len(skipped) == 3 and len(skipped[0]["rows"]) == 4
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_out_of_memory_gives_flags_to_paste(tmp_path: Path, data: dict) -> None:
    model = tiny()
    made = trainer(tmp_path, data, model)

    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.norm.register_forward_hook(exhausted)
    with pytest.raises(OutOfMemory) as caught:
        made.train()
    assert caught.value.exit_code == 71
    assert "--per_device_train_batch_size 2 --gradient_accumulation_steps 2" in str(caught.value)
    assert "--gradient_checkpointing true" in str(caught.value)
    assert "weights 0.00 GB" in str(caught.value) and "activations and the rest" in str(caught.value)


def test_saving_fails_three_times_then_stops(tmp_path: Path, data: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def refuse(root: Path, step: int, *rest: object, **names: object) -> None:
        tries.append(step)
        raise SaveError("no")

    monkeypatch.setattr(writer, "save", refuse)
    with pytest.raises(SaveError):
        trainer(tmp_path, data, max_steps=20, save_steps=2, eval_steps=100).train()
    assert tries == [2, 4, 6]


def test_a_used_folder_is_refused_unless_resumed(tmp_path: Path, data: dict) -> None:
    trainer(tmp_path, data).train()
    with pytest.raises(ConfigError, match="resume=True"):
        trainer(tmp_path, data)
    again = trainer(tmp_path, data, resume=True, max_steps=8)
    again.load_checkpoint(tmp_path / "checkpoints" / "step-00000006")
    assert again.train()["step"] == 8


def test_a_loss_weight_for_no_loss_is_refused(tmp_path: Path, data: dict) -> None:
    with pytest.raises(ConfigError, match="next_token"):
        trainer(tmp_path, data, loss_weights={"next_tokn": 0.5}, save_steps=1).train()
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_without_a_gpu_the_first_step_is_the_first_that_is_computed(tmp_path: Path, data: dict) -> None:
    made, passes = trainer(tmp_path, data, max_steps=1), []
    made.model.embedding.register_forward_hook(lambda *_: passes.append(made.state.step) if made.model.training else None)
    assert made.train()["step"] == 1 and passes == [0]


def test_callbacks_and_pinned_checkpoints(tmp_path: Path, data: dict) -> None:
    events: list[str] = []

    class Recorder(Callback):
        def on_log(self, context: Context) -> None:
            events.append("log")

        def on_evaluate(self, context: Context) -> None:
            assert context.metrics["labels"] > 0
            events.append("evaluate")

        def on_save(self, context: Context) -> None:
            events.append("save")

        def on_train_end(self, context: Context) -> None:
            assert context.summary["status"] == "finished"
            events.append("end")

    made = trainer(tmp_path / "run", data, callbacks=[Recorder()], eval_steps=3)
    made.train()
    assert events.count("log") == 6 and events.count("evaluate") == 2 and "save" in events and events[-1] == "end"
    path = made.save_checkpoint(tmp_path / "pinned")
    model, tokenizer = treadle.load(path)
    assert torch.equal(model.embedding.weight, made.model.embedding.weight) and tokenizer.kind == "byte"
    assert made.evaluate()["labels"] > 0


def test_columns_of_the_logs(tmp_path: Path, data: dict) -> None:
    trainer(tmp_path, data, report_to=["csv", "jsonl", "tensorboard"]).train()
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-2])
    needed = {"step", "loss", "bpb", "learning_rate", "grad_norm", "tokens", "tokens_per_second"}
    assert needed <= set(row) and row["bpb"] == pytest.approx(row["loss"] / math.log(2), rel=1e-6)  # bytes: one each
    header = (tmp_path / "training_log.csv").read_text().splitlines()[0].split(",")
    assert needed <= set(header) and len((tmp_path / "training_log.csv").read_text().splitlines()) == 7
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "eval/loss", "perf/tokens_per_second"} <= tags
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    for name in ("summary", "environment"):
        assert json.loads((tmp_path / f"{name}.json").read_text())
    assert "hidden_size = 16" in (tmp_path / "config.toml").read_text()


def test_a_models_own_numbers_reach_the_log(tmp_path: Path, data: dict) -> None:
    model = tiny()


    class Watched(type(model)):  # type: ignore[misc]
        def inspect(self, batch: Batch) -> dict[str, float]:
            return {"rows_seen": float(len(batch.input_ids)), "largest_weight": float(self.embedding.weight.abs().max())}

    model.__class__ = Watched
    trainer(tmp_path, data, model, eval_steps=3).train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if row.get("split") == "validation"]
    assert len(found) == 2 and all(row["rows_seen"] == 4 and row["largest_weight"] > 0 for row in found)


def test_weights_and_biases_offline(tmp_path: Path, data: dict) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    trainer(tmp_path, data, report_to=["wandb", "jsonl"], project="p").train()
    wandb.teardown()  # a run's finish() only asks its service to close the file, and does not wait for it
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    binary = next(run.glob("*.wandb")).read_bytes()
    assert b"train/loss" in binary and (tmp_path / "wandb_id").read_text().strip() in run.name


def test_a_profile_is_written(tmp_path: Path, data: dict) -> None:
    trainer(tmp_path, data, profile="2:2").train()
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_a_hand_written_loop_needs_only_the_public_names(text_file: Path) -> None:
    dataset = treadle.Dataset.load(str(text_file), tokenizer="byte", seq_len=32)
    model = treadle.build("transformer", vocab_size=256, hidden_size=16, num_layers=1, num_heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    from treadle.data import create_dataloader

    first = None
    for step, batch in enumerate(create_dataloader(dataset, 4)):
        total, count = treadle.loss(model(batch), batch)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        first = first or float(total / count)
        if step == 20:
            break
    assert float(total / count) < first - 1


def test_training_from_other_weights_and_train_as_a_function(text_file: Path, in_folder: Path) -> None:
    keys = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "seq_len": 32, "batch_size": 4, "sample_tokens": 0,
            "tokenizer.name": "byte", "max_steps": 2, "quiet": True}  # fmt: skip
    summary = treadle.train(text_file, run_name="one", **keys)
    assert summary["step"] == 2 and (in_folder / "runs" / "one" / "config.toml").is_file()
    from treadle.monitor.console import Console
    from treadle.start import Request, train

    flags = {"run_name": "two", "seq_len": "32", "batch_size": "4", "sample_tokens": "0", "max_steps": "1",
             "learning_rate": "1e-30", "weight_decay": "0"}  # fmt: skip
    train(Request(str(text_file), flags, weights_from="runs/one"), Console(quiet=True))
    one, two = (treadle.load(f"runs/{name}")[0] for name in ("one", "two"))
    torch.testing.assert_close(one.embedding.weight, two.embedding.weight)
    train(Request(str(text_file), {**flags, "run_name": "one"}, fresh=True), Console(quiet=True))
    assert (in_folder / "runs" / "one-2" / "config.toml").is_file()


def test_an_evaluation_that_is_not_finite_is_never_the_best(tmp_path: Path, data: dict) -> None:
    losses = iter([math.nan, 2.0, math.nan])
    made = trainer(tmp_path, data, eval_steps=2, early_stopping_patience=5)
    real = made.evaluator.evaluate
    made.evaluator.evaluate = lambda *a, **k: {**real(*a, **k), "loss": next(losses)}  # type: ignore[method-assign, dict-item]
    assert made.train()["best_step"] == 4 == best_step(tmp_path / "checkpoints")
    assert made.callbacks["early_stopping"].best == 2.0 and "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_compiled_blocks_train_alike(tmp_path: Path, data: dict) -> None:
    """Compiled and eager losses agree; where no compiler works, the error says to leave the flag out."""
    plain = trainer(tmp_path / "a", data, max_steps=3)
    plain.train()
    fast = trainer(tmp_path / "b", data, max_steps=3, torch_compile=True)
    try:
        fast.train()
    except ConfigError as problem:
        assert "--torch_compile" in str(problem)
        pytest.skip(f"no compiler works here: {problem}")
    for a, b in zip(plain.model.parameters(), fast.model.parameters()):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)
