"""Transformers with INL dynamics: off is the model without them, the velocity belongs to depth, statistics are watched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import treadle
from tests.conftest import flags
from tests.conftest import treadle as command
from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.models.base import Model, parameter_count
from treadle.models.inl import INL, INLConfig
from treadle.objectives.next_token import NextToken
from treadle.recipe import Layer, compose

SHAPE = {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
WAYS = [{"dynamics": d, "dynamics_placement": p} for d in ("full", "lite") for p in ("attention", "post")]


def small(arch: str = "inl", seed: int = 0, **keys: Any) -> Model:
    return treadle.build(arch, seed=seed, **{**SHAPE, **keys})


def shaken(model: Model, std: float = 1.0) -> Model:
    """Dynamics far from their start, as after much training."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".dynamics." in name:
                p.add_(torch.randn(p.shape, generator=generator) * std)
    return model


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(Batch.from_ids(tokens)).logits
    assert out is not None
    return out


def gradients(model: Model, **keys: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    NextToken()(model, Batch.for_training(ids(2, 24), **keys)).losses["next_token"].total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("style", [{}, {"style": "gpt2", "dropout": 0.1}, {"style": "gpt2", "pre_norm": False}])
def test_off_is_the_model_without_it(style: dict[str, Any]) -> None:
    """Weights, logits and gradients bit for bit; and no other parameter starts elsewhere where dynamics are on."""
    plain, off = small("transformer", **style), small(dynamics="none", **style)
    on = dict(small(**style).named_parameters())
    assert dict(plain.named_parameters()).keys() == dict(off.named_parameters()).keys()
    for name, p in plain.named_parameters():
        assert torch.equal(p, off.get_parameter(name)) and torch.equal(p, on[name]), name
    found = []
    for model in (plain, off):
        torch.manual_seed(0)
        found.append(gradients(model.train()))
        assert model.inspect(Batch.from_ids(ids(1, 4))) == {}
    assert all(torch.equal(g, found[1][name]) for name, g in found[0].items())
    assert torch.equal(logits(plain.eval(), ids(2, 9)), logits(off.eval(), ids(2, 9)))


def test_a_gate_that_is_shut_is_the_plain_model() -> None:
    """With gate = 0 nothing moves, in either place: the blocks are wired as the plain ones are."""
    for style in ({}, {"style": "gpt2"}, {"style": "gpt2", "pre_norm": False}):
        plain = logits(small("transformer", **style).eval(), ids(2, 12))
        for place in ("attention", "post"):
            model = small(dynamics_placement=place, **style).eval()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name.endswith("controller_out.bias"):
                        p[-32:] = -1e4
            assert torch.equal(logits(model, ids(2, 12)), plain), (style, place)


@pytest.mark.parametrize("keys", WAYS, ids=lambda k: "-".join(k.values()))
def test_velocity_runs_over_depth_alone(keys: dict[str, Any]) -> None:
    """By hand through the layers: zeros at the first block, each block's velocity to the next, none along tokens."""
    model = shaken(small(num_layers=3, **keys)).eval()
    batch = Batch.from_ids(ids(2, 10))
    context = model.context(batch, None)  # type: ignore[operator]
    x, v = model.embedding(batch.input_ids), torch.zeros(2, 10, 32)  # type: ignore[operator]
    with torch.no_grad():
        for block in model.blocks():
            y = block.attention(block.attention_norm(x), context)  # type: ignore[operator]
            if keys["dynamics_placement"] == "attention":
                y, v = block.dynamics(y, v)  # type: ignore[operator]
            x = x + y
            x = x + block.mlp(block.mlp_norm(x))  # type: ignore[operator]
            if keys["dynamics_placement"] == "post":
                x, v = block.dynamics(x, v)  # type: ignore[operator]
        torch.testing.assert_close(logits(model, ids(2, 10)), model.head(model.norm(x)))  # type: ignore[operator]
    assert float(v.abs().max()) > 0
    found = model.inspect(batch)
    assert found["velocity_rms"] > 0 and found["beta_max_seen"] <= 2.0


@pytest.mark.parametrize("keys", WAYS, ids=lambda k: "-".join(k.values()))
def test_packing_and_decoding_far_from_the_start(keys: dict[str, Any]) -> None:
    """Documents in a row stay apart, and a state is as large as without dynamics: a velocity needs no memory."""
    model = shaken(small(**keys)).eval()
    tokens, doc_ids = ids(1, 20), torch.tensor([[0] * 8 + [1] * 12])
    with torch.no_grad():
        packed = model(Batch.from_ids(tokens, doc_ids=doc_ids)).logits
    torch.testing.assert_close(packed[:, 8:], logits(model, tokens[:, 8:]), atol=1e-5, rtol=1e-4)
    full, state, parts = logits(model, tokens), model.new_state(1, 20), []
    assert state.nbytes == small("transformer").new_state(1, 20).nbytes == model.state_bytes(1, 20)
    with torch.no_grad():
        for t in range(20):
            out = model(Batch.from_ids(tokens[:, t : t + 1]), state=state)
            parts.append(out.logits)
            state = out.state
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("keys", WAYS, ids=lambda k: "-".join(k.values()))
def test_checkpointing_sees_the_same_velocity(keys: dict[str, Any]) -> None:
    model = shaken(small(num_layers=3, dropout=0.1, **keys)).train()
    torch.manual_seed(0)
    whole = gradients(model)
    treadle.enable_checkpointing(model)
    torch.manual_seed(0)
    again = gradients(model)
    assert all(torch.equal(g, again[name]) for name, g in whole.items())
    assert any(float(whole[name].abs().max()) > 0 for name in whole if name.endswith("dynamics.mu"))


@pytest.mark.parametrize("keys", WAYS, ids=lambda k: "-".join(k.values()))
def test_huge_activations_in_low_precision_are_finite(keys: dict[str, Any]) -> None:
    model = small(**keys).train()
    with torch.no_grad():
        model.get_parameter("embedding.weight").mul_(1e6)
    with treadle.autocast("bf16"):
        found = gradients(model)
    assert all(bool(g.isfinite().all()) for g in found.values())


def test_mu_is_not_decayed_and_the_controllers_matrices_are() -> None:
    from treadle.training.optim import Optimizers
    from treadle.training.settings import OptimSettings

    model = small()
    names = {id(p): name for name, p in model.named_parameters()}
    optimizers = Optimizers(model, OptimSettings(weight_decay=0.1))
    decayed = {
        names[id(p)]: group["weight_decay"] for one in optimizers.inner for group in one.param_groups for p in group["params"]
    }
    own = {name.rpartition("dynamics.")[2]: decay for name, decay in decayed.items() if ".0.dynamics." in name}
    assert own == {"mu": 0.0, "controller_in.weight": 0.1, "controller_in.bias": 0.0, "controller_out.weight": 0.1,
                   "controller_out.bias": 0.0}  # fmt: skip


def test_a_hybrid_has_dynamics_too() -> None:
    """Whatever mixes positions in a block."""
    model = small("transformer", layer_types=["attention", "full"], dynamics="lite")
    assert [block.dynamics is not None for block in model.blocks()] == [True, True]


def test_names_that_users_bring() -> None:
    def model(**table: Any) -> Any:
        recipe = compose([Layer({"model": {"arch": "transformer", **table}}, "test", True)])
        return INLConfig.with_preset(None, **recipe.model)

    for words in ({"use_inl_dynamics": "true"}, {"dynamics": "true"}, {"dynamics": "Full"}, {"inl_dynamics": "on"}):
        assert model(**words).dynamics == "full"
    assert model(use_dynamics="false").dynamics == "none"
    found = model(dynamics="lite", dynamics_placement="attn", dt="0.2", dynamics_controller_hidden="32", mu_init="0.5")
    assert (found.dynamics_placement, found.dynamics_step, found.dynamics_controller_size, found.mu_initial) == ("attention", 0.2, 32, 0.5)
    for arch in ("inl", "inl_transformer", "dynamics"):
        recipe = compose([Layer({"model.arch": arch}, "test", True)])
        assert recipe.arch == "inl" and INLConfig.with_preset(None, **recipe.model).dynamics == "full"
    with pytest.raises(ConfigError, match=r"use a dynamics_step below 1"):
        model(dynamics="full", dynamics_step="1.5")


def test_presets_say_the_truth_and_stay_with_their_architecture() -> None:
    sizes = INLConfig.preset_sizes()
    assert sizes.keys() == INLConfig.presets().keys()
    for name, size in sizes.items():
        assert parameter_count(INL, INLConfig.with_preset(name)) == pytest.approx(size, rel=0.05), name
    for first, preset, arch in (("transformer", "tiny", "transformer"), ("inl", "nano", "inl"), ("shc", "gpt2", "transformer")):
        layers = [Layer({"model.arch": first}, "recipe"), Layer({"model.preset": preset}, "flag")]
        assert compose(layers).arch == arch


def test_trained_and_watched_from_the_command_line(text_file: Path, tmp_path: Path) -> None:
    keys = flags(max_steps=8, batch_size=4, eval_steps=4, eval_rows=8, save_steps=8)
    out = command("train", text_file, "--arch", "inl", "--output_dir", tmp_path / "r", *keys)
    assert out.returncode == 0, out.stderr
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    watched = [row for row in rows if row.get("split") == "validation"]
    assert len(watched) == 2
    for row in watched:
        assert row["mu_min"] <= row["mu_mean"] <= row["mu_max"] and row["mu_std"] > 0
        assert 0 < row["beta_max_seen"] <= 2 and row["velocity_rms"] > 0
    shown = command("eval", tmp_path / "r", "--stats", "--samples", 0)
    assert shown.returncode == 0 and "velocity_rms" in shown.stdout and "beta_max_seen" in shown.stdout, shown.stderr
