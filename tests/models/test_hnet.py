"""The hierarchical byte model: stepping is the full forward with other boundaries in every row, and presets are exact."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import treadle
from tests.conftest import treadle as command
from tests.models.rows import ids, packed_and_alone
from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.layers.hierarchy import Boundaries, ratio_loss
from treadle.models.base import parameter_count
from treadle.models.hnet import HNet, HNetConfig
from treadle.objectives.next_token import NextToken
from treadle.recipe import Layer, compose

ONE = {"hidden_sizes": [32, 48], "num_blocks": [[1, 0, 1], [2]]}
TWO = {"hidden_sizes": [32, 32, 48], "num_blocks": [[1, 0, 1], [1, 0, 1], [1]]}


def small(seed: int = 0, **keys: Any) -> HNet:
    model = treadle.build("hnet", seed=seed, **{"vocab_size": 256, **ONE, **keys}).eval()
    with torch.no_grad():  # embeddings alone make every position unlike the one before it; after some training they are not
        for name, p in model.named_parameters():
            if "router" in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)
            if name.endswith("residual.weight"):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
    return model  # type: ignore[return-value]


MIXED = {
    "hgrn in the middle": {**ONE, "token_mixers": ["hgrn_bit", "hgrn"]},
    "attention in the middle": {**ONE, "token_mixers": ["hgrn_bit", ["hgrn_bit", "attention"]], "local_window": 5},
    "attention in all": {**ONE, "token_mixers": ["attention", "attention"], "local_window": 6},
    "ssm inside attention": {**TWO, "token_mixers": ["hgrn_bit", "attention", "ssm"], "local_window": 8},
}


@pytest.mark.parametrize("shape", [
    *(pytest.param({**shape, "convolution_size": size}, id=f"{name} {size}")
      for name, shape in (("one", ONE), ("two", TWO)) for size in (0, 4)),
    *(pytest.param(shape, id=name) for name, shape in MIXED.items()),
])  # fmt: skip
def test_stepping_is_the_full_forward_with_boundaries_of_every_rows_own(shape: dict[str, Any]) -> None:
    model = small(**shape)
    for rows in (1, 4):
        tokens = ids(rows, 40, rows)
        with torch.no_grad():
            full = model(Batch.from_ids(tokens)).logits
        marks = model.boundaries(Batch.from_ids(tokens))
        assert 0.2 < marks[0].float().mean() < 0.95 and (rows == 1 or not torch.equal(marks[0][0], marks[0][1]))
        with torch.no_grad():
            out = model(Batch.from_ids(tokens[:, :7]), state=model.new_state(rows, 40))
            assert (out.logits - full[:, :7]).abs().max() <= 1e-4
            for t in range(7, 40):
                out = model(Batch.from_ids(tokens[:, t : t + 1]), state=out.state)
                assert (out.logits[:, 0] - full[:, t]).abs().max() <= 1e-4, t


@pytest.mark.parametrize("shape", [ONE, TWO], ids=["one", "two"])
def test_256_greedy_bytes_are_those_of_full_recomputation(shape: dict[str, Any]) -> None:
    model = small(**shape)
    prompt = ids(2, 9)
    made = model.generate(prompt, max_new_tokens=256, temperature=0.0)
    with torch.no_grad():
        again = model(Batch.from_ids(made[:, :-1])).logits.argmax(-1)
    assert torch.equal(again[:, 8:], made[:, 9:])


def test_every_document_begins_a_chunk_and_padding_none() -> None:
    model = small()
    docs = torch.tensor([[-1] * 3 + [0] * 11 + [1] * 14 + [-1] * 2])
    (marks,) = model.boundaries(Batch.from_ids(ids(1, 30), doc_ids=docs))
    assert marks[0, 3] and marks[0, 14] and not marks[0, :3].any() and not marks[0, 28:].any()


def test_the_ratio_loss_is_smallest_at_its_target() -> None:
    real = torch.ones(1, 600, dtype=torch.bool)
    found = {}
    for every in (2, 3, 4, 6, 12, 30):
        chosen = torch.arange(600)[None] % every == 0
        found[every] = float(ratio_loss(Boundaries(chosen.float(), chosen), real, 6.0))
    assert min(found, key=found.get) == 6 and found[6] == pytest.approx(1.0)  # type: ignore[arg-type]


def test_losses_and_statistics_are_apart() -> None:
    model = small(**TWO).train()
    batch = Batch.for_training(ids(3, 50))
    parts = NextToken()(model, batch)
    assert set(parts.losses) == {"next_token", "ratio"} and parts.losses["ratio"].unit == "tokens"
    rate = float(parts.stats["boundary_rate_0"])
    assert 0 < rate <= 1 and float(parts.stats["tokens_per_chunk_0"]) == pytest.approx(1 / rate, rel=1e-5)
    assert float(parts.stats["tokens_per_chunk_1"]) >= float(parts.stats["tokens_per_chunk_0"])


def test_presets_have_exactly_their_parameters() -> None:
    for name, count in HNetConfig.preset_sizes().items():
        assert parameter_count(HNet, HNetConfig.with_preset(name)) == count


def test_learning_rates_follow_the_stages() -> None:
    def rates(**keys: Any) -> list[float]:
        with torch.device("meta"):
            rules = HNet(HNetConfig(**keys)).parameter_rules()
        names = ["embedding.weight", "stage.inner.encoder_norm.weight", "stage.inner.inner.encoder_norm.weight"]
        assert rules["head.weight"] == rules["embedding.weight"]
        outer = rules["embedding.weight"].learning_rate_multiplier
        assert rules["stage.router.query.weight"].learning_rate_multiplier == pytest.approx(10 * outer, rel=1e-4)
        return [round(rules[n].learning_rate_multiplier, 2) for n in names if n in rules]

    assert rates(hidden_sizes=[256, 384], num_blocks=[[1, 0, 1], [1]], target_ratios=[4]) == [2.63, 1.07]
    assert rates(hidden_sizes=[512, 768, 1024], num_blocks=[[1, 0, 1], [1, 0, 1], [1]]) == [3.03, 1.43, 0.71]


def test_a_json_configuration_loads_and_what_does_not_fit_is_said(tmp_path: Path) -> None:
    table = {"model_type": "hnet_bit", "vocab_size": 256, "d_model": [32, 48], "num_blocks": [[1, 0, 1], [2]], "num_heads": 2,
             "expand_ratio": 1, "hidden_ratio": 2, "attn_mode": "fused_recurrent", "max_position_embeddings": 64,
             "rms_norm_eps": 1e-6}  # fmt: skip
    path = tmp_path / "model.json"
    path.write_text(json.dumps(table))
    (tmp_path / "t.txt").write_text("one two three four five six seven\n" * 300)
    common = ["--tokenizer.name", "byte", "--batch_size", 2, "--output_dir", tmp_path / "r"]
    out = command("train", tmp_path / "t.txt", "--model.config_file", path, "--max_steps", 2, *common)
    assert out.returncode == 0, out.stderr
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert "seq_len = 64" in (tmp_path / "r" / "config.toml").read_text() and rows[0]["loss_ratio"] > 0 and 0 < rows[0]["boundary_rate_0"] <= 1
    shown = command("generate", tmp_path / "r", "--prompt", "one two", "--max-new-tokens", 4, "--show-chunks")
    assert shown.returncode == 0 and "\x1b[" in shown.stdout and "tokens per chunk" in shown.stdout, shown.stderr
    for change, words in (({"d_model": [32]}, "1 stages"), ({"num_blocks": [[1, 1], [2]]}, "encoder, 0, decoder"),
                          ({"hidden_stride": 3}, "hidden_stride")):  # fmt: skip
        path.write_text(json.dumps({**table, **change}))
        out = command("train", tmp_path / "t.txt", "--model.config_file", path, "--fresh", *common)
        assert out.returncode == 2 and words in out.stderr, out.stderr


def test_lists_from_the_command_line() -> None:
    given = {"model.arch": "hnet", "hidden_sizes": "96,128", "num_blocks": "[[1, 0, 1], [3]]", "target_ratios": "4"}
    recipe = compose([Layer(given, "flag", from_text=True)])
    assert HNetConfig.with_preset(None, **recipe.model).ratios == [4.0]


@pytest.mark.parametrize("shape", MIXED.values(), ids=list(MIXED))
def test_mixed_stages_keep_packed_and_padded_documents_apart(shape: dict[str, Any]) -> None:
    assert all((packed - alone).abs().max() <= 1e-6 for packed, alone in packed_and_alone(small(**shape)))


def test_the_inner_stages_run_only_where_a_chunk_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    tokens = ids(1, 40, 1)
    (marks,) = model.boundaries(Batch.from_ids(tokens))
    ran = []
    forward = type(model.stage.inner).forward
    monkeypatch.setattr(type(model.stage), "forward", lambda self, *a: (ran.append(self.innermost), forward(self, *a))[1])
    state = model.new_state(1, 40)
    with torch.no_grad():
        for t in range(40):
            state = model(Batch.from_ids(tokens[:, t : t + 1]), state=state).state
    assert sum(ran) == int(marks.sum()) < 40


def test_shapes_that_do_not_fit() -> None:
    for keys, words in (({"hidden_sizes": [48, 32]}, "narrower"), ({"target_ratios": [1.0]}, "above 1"),
                        ({"hidden_sizes": [8], "num_blocks": [[1]]}, "hgrn_bit"), ({"token_mixers": ["hgrn"]}, "each of 2 stages"),
                        ({"token_mixers": ["hgrn", "attention"], "attention_heads": 5}, "attention_heads = 5"),
                        ({"num_heads": 5}, "num_heads = 5"), ({"convolution_size": 1}, "0 for none")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            small(**keys)
    assert math.isclose(HNetConfig(**TWO).ratios[0], 3.0)


@pytest.mark.slow
def test_chunks_are_learned_at_the_rate_that_was_asked_for(tmp_path: Path) -> None:
    """1500 steps with and without the ratio loss: the rate stays where it is useful, and costs little quality."""
    found = {}
    for weight in (0.03, 0.0):
        done = command("train", "hnet", "--hidden_sizes", "64,96", "--num_blocks", "[[1,0,1],[2]]", "--ratio_weight", weight,
                       "--max_steps", 1500, "--warmup_steps", 300, "--lr", 3e-3, "--batch_size", 8, "--seq_len", 128,
                       "--logging_steps", 1, "--eval_steps", 1500, "--precision", "fp32", "--report_to", "jsonl", "--output_dir",
                       tmp_path / str(weight), timeout=1200)  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (tmp_path / str(weight) / "metrics.jsonl").read_text().splitlines()]
        (evaluation,) = [row for row in rows if row.get("split") == "validation"]
        rates = [row["boundary_rate_0"] for row in rows if "boundary_rate_0" in row and "split" not in row]
        found[weight] = rates, sum(rates[-100:]) / 100, evaluation["bpb"]
    (rates, last, quality), (_, free_last, free_quality) = found[0.03], found[0.0]
    assert len(rates) == 1500 and 0.20 <= last <= 0.35 and all(0.05 <= rate <= 0.95 for rate in rates), (last, min(rates), max(rates))
    assert quality <= free_quality + 0.05 and free_last >= 1.5 * last, (quality, free_quality, last, free_last)
