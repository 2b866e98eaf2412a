"""Multi-stream transformers: the routings' mathematics, the start as a plain transformer, presets, looking at routers."""

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
from treadle.layers.streams import Router
from treadle.models.base import parameter_count
from treadle.models.shc import SHC, SHCConfig
from treadle.ops import rotations
from treadle.recipe import Layer, compose

ROUTINGS = ["cayley_lie", "cayley_mixture", "sinkhorn", "birkhoff", "none"]


def small(seed: int = 0, **keys: Any) -> SHC:
    shape = {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 2, **keys}
    return treadle.build("shc", seed=seed, **shape).eval()  # type: ignore[return-value]


def shaken(model: SHC, std: float = 0.5) -> SHC:
    """Routers far from their start, as after much training."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "router" in name or "stream" in name:
                p.add_(torch.randn(p.shape, generator=generator) * std)
    return model


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: SHC, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(Batch.from_ids(tokens)).logits


@pytest.mark.parametrize("rank", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_causal_and_independent_of_batch_mates(routing: str, rank: bool) -> None:
    model = shaken(small(routing=routing, adaptive_rank=rank and routing != "none"))
    tokens = ids(3, 24)
    changed = tokens.clone()
    changed[:, 13] = (changed[:, 13] + 1) % 61
    before, after = logits(model, tokens), logits(model, changed)
    assert (before[:, :13] - after[:, :13]).abs().max() <= 1e-6 and not torch.allclose(before[:, 13:], after[:, 13:])
    assert (logits(model, tokens[1:2]) - before[1:2]).abs().max() <= 1e-5


@pytest.mark.parametrize("keys", [{}, {"adaptive_rank": True}, {"routing": "sinkhorn"}, {"latent_size": 20}])
def test_64_greedy_tokens_with_the_cache_are_those_of_full_recomputation(keys: dict[str, Any]) -> None:
    model, prompts = shaken(small(**keys)), [ids(1, 9)[0], ids(1, 5, 1)[0]]
    for prompt in prompts:
        seen = prompt[None]
        state = model.new_state(1, 80)
        step = model(Batch.from_ids(seen), state=state)
        for _ in range(64):
            full = logits(model, seen)[:, -1]
            cached = step.logits[:, -1].detach()
            assert (full - cached).abs().max() <= 1e-4
            token = full.argmax(-1, keepdim=True)
            assert torch.equal(token, cached.argmax(-1, keepdim=True))
            seen = torch.cat([seen, token], 1)
            step = model(Batch.from_ids(token), state=step.state)
    longest = max(len(p) for p in prompts)
    left = [[0] * (longest - len(p)) + p.tolist() for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    padded = model.generate(left, max_new_tokens=64, temperature=0.0, attention_mask=mask)
    for row, prompt in zip(padded, prompts):
        alone = model.generate(prompt.tolist(), max_new_tokens=64, temperature=0.0)[0]
        assert row[-64:].tolist() == alone[-64:].tolist()


def test_the_closed_form_is_the_cayley_transform() -> None:
    numbers = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    closed, solved = rotations.cayley(numbers, 4), rotations.cayley_reference(numbers, 4)
    assert (closed - solved).abs().max() < 1e-12
    assert (torch.linalg.det(closed) - 1).abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda p: rotations.cayley(p, 4), (numbers[:4],))
    for n in (2, 3, 5):
        q = rotations.cayley(torch.randn(9, rotations.generator_count(n)), n)
        assert (q @ q.transpose(1, 2) - torch.eye(n)).abs().max() < 1e-5


@pytest.mark.parametrize("std", [0.1, 0.3, 1.0])
def test_a_signal_keeps_its_size_through_128_sublayers(std: float) -> None:
    """The bound is on the residual path: orthogonal mixing keeps it exactly, the mixture of rotations may lose it."""
    model = shaken(small(num_layers=64, hidden_size=16, num_heads=1), std)
    found = model.routing_stats(Batch.from_ids(ids(2, 8)))
    assert len(found["sublayers"]) == 128
    assert abs(found["composite_max"] - 1) < 1e-4 and abs(found["composite_min"] - 1) < 1e-4
    mixture = shaken(small(num_layers=64, hidden_size=16, num_heads=1, routing="cayley_mixture"), std)
    found = mixture.routing_stats(Batch.from_ids(ids(2, 8)))
    assert found["composite_max"] <= 1 + 1e-5 and all(row["sigma_max"] <= 1 + 1e-5 for row in found["sublayers"])
    assert found["composite_min"] < 0.9  # so the bar above is no accident


@pytest.mark.parametrize("routing", ["sinkhorn", "birkhoff"])
def test_rows_and_columns_sum_to_one(routing: str) -> None:
    router = Router(8, 4, routing)  # type: ignore[arg-type]
    torch.nn.init.normal_(router.weight)
    mixing = router.route(torch.randn(20, 4, 8)).mixing
    for dim in (1, 2):
        assert (mixing.sum(dim) - 1).abs().max() < 1e-3  # Sinkhorn stops after 20 steps


def test_two_forms_of_sinkhorn_agree() -> None:
    table = torch.randn(10, 4, 4)
    assert torch.allclose(rotations.sinkhorn(table), rotations.sinkhorn_lean(table), atol=1e-5)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_it_starts_as_a_plain_transformer(routing: str) -> None:
    """With the router's small noise taken away the same weights in the dense transformer give the same logits."""
    model = small(routing=routing)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("generators", "router.gain", "stream_scale", "stream_shift")):
                p.zero_()
    plain = treadle.build("transformer", vocab_size=61, hidden_size=32, num_layers=2, num_heads=2).eval()
    own = model.named_weights()
    plain.load_weights({name: own[name] for name in plain.named_weights()})
    tokens = ids(2, 20)
    # (Doubly stochastic mixing leaks 3e-4 of a stream into each other one; all are equal here.)
    assert torch.allclose(logits(model, tokens), plain(Batch.from_ids(tokens)).logits, atol=2e-5)


def test_presets_have_the_size_of_their_names_and_bring_their_training() -> None:
    for name, size in SHCConfig.preset_sizes().items():
        assert parameter_count(SHC, SHCConfig.with_preset(name)) == pytest.approx(size, rel=0.1)
        assert SHCConfig.with_preset(name) is not SHCConfig.with_preset(name)
    recipe = compose([Layer({"model.arch": "shc", "model.preset": "500m"}, "flag")])
    assert (recipe.optim.learning_rate, recipe.train.global_batch_size, recipe.optim.warmup_steps) == (3e-4, 1024, 2000)
    assert recipe.data.seq_len == 4096
    mine = compose([Layer({"model.arch": "shc", "model.preset": "7b", "lr": 1e-3}, "flag")])
    assert (mine.optim.learning_rate, mine.train.global_batch_size) == (1e-3, 512)


def test_the_streams_add_little_to_the_parameters() -> None:
    shape = {"vocab_size": 256, "hidden_size": 512, "num_layers": 4, "num_heads": 8}
    four, one = (treadle.build("shc", num_streams=n, **shape).parameter_count() for n in (4, 1))
    assert 1 < four / one < 1.015


def test_looking_changes_nothing(tmp_path: Path) -> None:
    model = small(adaptive_rank=True).train()
    before = torch.get_rng_state()
    for rows in (1, 5):
        found = model.routing_stats(Batch.from_ids(ids(rows, 12)))
        assert {"sigma_max", "sigma_min", "max_share", "entropy", "effective_components", "pre_norm", "post_norm",
                "rank"} == set(found["sublayers"][0])  # fmt: skip
    assert model.routing_stats()["composite_max"] == pytest.approx(1, abs=1e-4)
    assert model.training and torch.equal(before, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())


def test_adaptive_rank_reads_fewer_streams_and_is_learned() -> None:
    model = small(adaptive_rank=True).train()
    out = model(Batch.from_ids(ids(2, 16)))
    out.logits.logsumexp(-1).sum().backward()
    router = model.layers[0].attention_router
    assert router.weight.grad[-4:].abs().max() > 0 and router.bias.grad[-4:].abs().max() > 0
    with torch.no_grad():
        router.bias[-4:] = torch.tensor([9.0, 0, 0, 0])
    routed = router.eval().route(torch.randn(6, 4, 32))
    assert torch.equal(routed.pre[:, 1:], torch.zeros(6, 3)) and torch.equal(routed.rank, torch.ones(6))


def test_trained_and_watched_from_the_command_line(text_file: Path, tmp_path: Path) -> None:
    keys = flags(max_steps=20, batch_size=4, eval_steps=10, eval_rows=8, hidden_size=32, num_layers=2, num_heads=2, save_steps=20)
    out = command("train", text_file, "--model.arch", "shc", "--output_dir", tmp_path / "r", *keys)
    assert out.returncode == 0, out.stderr
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    watched = [row for row in rows if row.get("split") == "validation"]
    assert len(watched) == 2
    for row in watched:  # also on a trained model
        assert abs(row["routing_composite_max"] - 1) < 1e-4 and abs(row["routing_sigma_min"] - 1) < 1e-4
    shown = command("eval", tmp_path / "r", "--stats", "--samples", 0)
    assert shown.returncode == 0 and "routing_composite_max 1.0000" in shown.stdout, shown.stderr
    model, _ = treadle.load(tmp_path / "r")
    assert model.routing_stats()["sublayers"][3]["entropy"] > 0


def test_a_cache_compressed_to_full_rank_changes_nothing_and_to_less_little() -> None:
    model = small(num_kv_heads=1)
    batches = [Batch.from_ids(ids(8, 40, seed)) for seed in range(3)]
    whole = treadle.compress_cache(model, batches, 32)
    before = logits(model, ids(2, 30))
    assert (logits(whole, ids(2, 30)) - before).abs().max() < 1e-3
    gaps = [float((logits(treadle.compress_cache(model, batches, r), ids(2, 30)) - before).norm()) for r in (24, 8, 2)]
    assert gaps[0] < gaps[1] < gaps[2]
    with pytest.raises(ConfigError, match="shc"):
        treadle.compress_cache(treadle.build("transformer", vocab_size=61, hidden_size=32), batches, 8)
