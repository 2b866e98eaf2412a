"""SOAP, the average of the weights, and rates that move to another width."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import flags, treadle
from treadle.checkpoint.layout import checkpoint_name
from treadle.checkpoint.reader import Checkpoint
from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.models.base import build
from treadle.objectives.base import ModelWithObjective
from treadle.objectives.next_token import NextToken
from treadle.training.optim import Optimizers, grouped
from treadle.training.settings import OptimSettings
from treadle.training.soap import SOAP
from treadle.training.step import Stepper
from treadle.training.weight_average import WeightAverage


def tiny(**keys: Any) -> Any:
    return build("transformer", **{"vocab_size": 256, "hidden_size": 16, "num_layers": 2, "num_heads": 2, **keys})


# ---- SOAP ----


def test_soap_in_a_basis_that_is_the_identity_is_adam() -> None:
    weights = [torch.nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    soap = SOAP([weights[0]], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, precondition_frequency=1000)
    adam = torch.optim.AdamW([weights[1]], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(5):
        for weight in weights:
            weight.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        soap.step()
        if step == 0:  # which only makes the bases
            soap.state[weights[0]] |= {"left_basis": torch.eye(6), "right_basis": torch.eye(4)}
        else:
            adam.step()
        torch.testing.assert_close(weights[0], weights[1])


def test_soap_does_not_depend_on_the_basis_of_the_weights() -> None:
    """Turned weights with turned gradients move as the weights do, turned; Adam's would not."""
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q.float()
    one, other = torch.nn.Parameter(torch.zeros(4, 4)), torch.nn.Parameter(torch.zeros(4, 4))
    optimizers = [SOAP([w], lr=0.01, weight_decay=0.0, precondition_frequency=2) for w in (one, other)]
    for _ in range(6):
        gradient = torch.randn(4, 4)
        one.grad, other.grad = gradient, turn @ gradient
        for optimizer in optimizers:
            optimizer.step()
    assert one.abs().max() > 0.01
    torch.testing.assert_close(other, turn @ one, atol=2e-4, rtol=0)


def test_soap_has_the_blocks_matrices_and_refuses_parts() -> None:
    model = tiny()
    soap, _adamw = Optimizers(model, OptimSettings(name="soap")).inner
    names = {name for group in soap.param_groups for name in group["names"]}
    assert names == {n for n, p in model.named_parameters() if n.startswith("layers.") and p.dim() == 2}
    with pytest.raises(ConfigError, match="whole matrices"):
        Optimizers(model, OptimSettings(name="soap"), sharded=True)


def test_soap_is_planned() -> None:
    shown = treadle("plan", "--model.arch", "transformer", *flags(**{"optim.name": "soap", "model.vocab_size": 256}))
    assert shown.returncode == 0 and "optimiser" in shown.stdout, shown.stderr


# ---- the average ----


def test_the_average_is_the_weighted_sum_of_all_weights() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    average = WeightAverage([("w", weight)], decay=0.5)
    wanted = 0.0
    for step in range(1, 12):
        weight.data.fill_(float(step))
        average.update()
        decay = min(0.5, step / (9 + step))
        wanted = decay * wanted + (1 - decay) * step
    assert average.averages["w"].tolist() == pytest.approx([wanted] * 3)
    with average.used():
        assert weight.tolist() == pytest.approx([wanted] * 3)
        assert average.named_averages()["w"] is not average.averages["w"]
        assert average.state_tensors()["w|weight"].tolist() == [11.0] * 3
    assert weight.tolist() == [11.0] * 3


def stepped(optim: OptimSettings, steps: int, model: Any, optimizers: Optimizers) -> None:
    stepper = Stepper(ModelWithObjective(model, NextToken()), optimizers, seed=0, precision="fp32", max_grad_norm=1.0, loss_weights={})
    batch = Batch.for_training(torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(1)))
    for step in range(steps):
        stepper.run(step, [batch], optim.learning_rate)


def test_soap_goes_on_from_a_copy_to_the_bit() -> None:
    """A QR decomposition gives its basis by columns; narrow products of it round differently from those of its copy."""
    weights = [torch.nn.Parameter(torch.zeros(8, 320)) for _ in range(2)]
    one, other = (SOAP([w], lr=0.01, precondition_frequency=1) for w in weights)
    for step in range(6):
        for weight in weights:
            weight.grad = torch.randn(8, 320, generator=torch.Generator().manual_seed(step))
        one.step()
        other.step()
        for key, value in other.state[weights[1]].items():
            other.state[weights[1]][key] = torch.as_tensor(value).clone(memory_format=torch.contiguous_format)
    assert torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("name", ["adamw", "muon", "normuon", "soap"])
def test_state_goes_and_comes_back(name: str) -> None:
    optim = OptimSettings(name=name, ema=0.9, soap_precondition_frequency=2, learning_rate=0.01)  # type: ignore[arg-type]
    model, other = tiny(), tiny(initializer_range=0.1)
    optimizers, again = Optimizers(model, optim), Optimizers(other, optim)
    stepped(optim, 3, model, optimizers)
    saved = {n: t.clone() for n, t in optimizers.named_weights(model).items()}, {n: t.clone() for n, t in optimizers.state_tensors().items()}
    assert not torch.equal(saved[0]["embedding.weight"], dict(model.named_parameters())["embedding.weight"])
    targets = again.empty_state({n: list(t.shape) for n, t in saved[1].items()})
    for n, tensor in saved[1].items():
        assert targets[n].shape == tensor.shape
        targets[n].copy_(tensor)
    other.load_weights(saved[0])
    again.load_state_tensors(targets)
    stepped(optim, 2, model, optimizers)
    stepped(optim, 2, other, again)
    for (n, a), b in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(a, b), n
    for n, tensor in optimizers.state_tensors().items():
        assert torch.equal(tensor, again.state_tensors()[n]), n


@pytest.mark.parametrize("before, after", itertools.permutations(("adamw", "muon", "normuon", "soap"), 2))
def test_another_optimiser_begins_anew_where_the_state_is_not_its_own(before: str, after: str) -> None:
    """As --allow-change optim.name allows. Muon and NorMuon have their momentum in common, and all have AdamW for what is no matrix."""
    old, new = OptimSettings(name=before, learning_rate=0.01), OptimSettings(name=after, learning_rate=0.01)  # type: ignore[arg-type]
    model, other = tiny(), tiny()
    optimizers, changed = Optimizers(model, old), Optimizers(other, new)
    stepped(old, 3, model, optimizers)
    other.load_weights(optimizers.named_weights(model))
    anew = changed.load_state_tensors({n: t.clone() for n, t in optimizers.state_tensors().items()})
    matrices = [n for n, p in other.layers.named_parameters(prefix="layers") if p.dim() == 2]
    assert sorted(anew) == ([] if {before, after} == {"muon", "normuon"} else sorted(matrices))
    if {before, after} == {"muon", "normuon"}:
        name = f"{matrices[0]}|momentum_buffer"
        assert torch.equal(changed.state_tensors()[name], optimizers.state_tensors()[name])
    stepped(new, 3, other, changed)
    kept = {n.rpartition("|")[2] for n in changed.state_tensors() if n.rpartition("|")[0] in matrices}
    fresh = tiny()
    stepped(new, 3, fresh, untouched := Optimizers(fresh, new))
    assert kept == {n.rpartition("|")[2] for n in untouched.state_tensors() if n.rpartition("|")[0] in matrices}


@pytest.mark.parametrize("name", ["muon", "normuon", "soap"])
def test_a_matrix_of_one_row_is_a_vector(name: str) -> None:
    model = tiny(num_layers=1)
    model.layers[0].one = torch.nn.Linear(8, 1)  # type: ignore[union-attr]
    orthogonal, adamw = Optimizers(model, OptimSettings(name=name)).inner  # type: ignore[arg-type]
    names = [{n for group in optimizer.param_groups for n in group["names"]} for optimizer in (orthogonal, adamw)]
    assert "layers.0.one.weight" in names[1] and "layers.0.mlp.up.weight" in names[0]


def test_without_the_average_training_goes_on_from_the_weights() -> None:
    optim = OptimSettings(ema=0.9, learning_rate=0.01)
    model, other = tiny(), tiny()
    optimizers, plain = Optimizers(model, optim), Optimizers(other, OptimSettings(learning_rate=0.01))
    stepped(optim, 3, model, optimizers)
    other.load_weights(optimizers.named_weights(model))
    plain.load_state_tensors(optimizers.state_tensors())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_the_weights_come_back_before_training_goes_on() -> None:
    optim = OptimSettings(ema=0.9, learning_rate=0.01)
    model, other = tiny(), tiny()
    optimizers, whole = Optimizers(model, optim), Optimizers(other, optim)
    stepped(optim, 2, model, optimizers)
    optimizers.use_average(True)
    averaged = {n: p.clone() for n, p in model.named_parameters()}
    assert all(torch.equal(t, averaged[n]) for n, t in optimizers.named_weights(model).items())
    optimizers.use_average(False)
    stepped(optim, 2, model, optimizers)
    stepped(optim, 2, other, whole)
    stepped(optim, 2, other, whole)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert not torch.equal(averaged["embedding.weight"], model.embedding.weight)


def test_a_run_evaluates_saves_and_resumes_its_average(text_file: Path, tmp_path: Path) -> None:
    keys = {"optim.ema": 0.8, "learning_rate": 0.01, "lr_scheduler_type": "constant", "warmup_steps": 1, "eval_steps": 3, "save_steps": 100}

    def run(folder: str, steps: int, **more: object) -> None:
        done = treadle("train", text_file, "--output_dir", tmp_path / folder, *flags(max_steps=steps, **{**keys, **more}))
        assert done.returncode == 0, done.stdout + done.stderr

    run("whole", 6)
    run("parts", 3)
    run("parts", 6)
    (a, b) = (Checkpoint(tmp_path / f / "checkpoints" / checkpoint_name(6)).manifest["files"] for f in ("whole", "parts"))
    assert {n: a[n] for n in ("model.safetensors", "optimizer.safetensors")} == {n: b[n] for n in ("model.safetensors", "optimizer.safetensors")}
    run("plain", 6, **{"optim.ema": "none"})
    lines = {f: [json.loads(line) for line in (tmp_path / f / "metrics.jsonl").read_text().splitlines()] for f in ("whole", "plain")}
    losses = {f: [row["loss"] for row in rows if "learning_rate" in row] for f, rows in lines.items()}
    assert losses["whole"] == losses["plain"]  # training does not see the average
    evaluated = {f: (tmp_path / f / "eval_log.csv").read_text() for f in lines}
    assert evaluated["whole"] != evaluated["plain"]
    averaged, plain = (Checkpoint(tmp_path / f / "checkpoints" / checkpoint_name(6)) for f in ("whole", "plain"))
    trained = averaged.tensors("optimizer")
    for name, weight in plain.tensors("model").items():
        assert torch.equal(trained[f"{name}|weight"], weight) and not torch.equal(averaged.tensors("model")[name], weight)


# ---- width ----


def test_rates_of_another_width() -> None:
    model = tiny(hidden_size=64, num_heads=8, mup_base_width=16)
    adamw = {n: multiplier for (multiplier, _), named in grouped(model, OptimSettings()).items() for n, _ in named}
    assert adamw["layers.0.mlp.up.weight"] == 0.25 and adamw["embedding.weight"] == adamw["layers.0.mlp_norm.weight"] == 1.0
    muon = {n: multiplier for (multiplier, _), named in grouped(model, OptimSettings(), 0.5).items() for n, _ in named}
    assert muon["layers.0.mlp.up.weight"] == 0.5
    assert model.initial("layers.0.mlp.up.weight", model.layers[0].mlp.up.weight) == 0.01


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_with_mup_outputs_move_as_far_at_every_width(name: str) -> None:
    """The coordinate check (Yang et al. 2022, appendix D.1): how much four steps move the logits, at widths 32 and 256."""

    def moved(width: int, base: int | None) -> float:
        model = tiny(hidden_size=width, head_dim=16, num_heads=width // 16, mup_base_width=base, tie_embeddings=False)
        batch = Batch.for_training(torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(1)))
        optim = OptimSettings(name=name, learning_rate=0.01, weight_decay=0.0)  # type: ignore[arg-type]
        with torch.no_grad():
            before = model(batch).logits.clone()
        stepped(optim, 4, model, Optimizers(model, optim))
        with torch.no_grad():
            return float((model(batch).logits - before).square().mean().sqrt())

    with_mup, without = moved(256, 32) / moved(32, 32), moved(256, None) / moved(32, None)
    assert 0.5 < with_mup < 2.0 and without > 2.0 * with_mup, (with_mup, without)
