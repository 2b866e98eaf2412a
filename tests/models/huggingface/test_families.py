"""Each family in and out: equal logits, equal greedy text with a cache, training goes on, and transformers reads it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

import treadle
from tests.models.huggingface.families import CASES, ids, their_logits, written
from treadle.data.batch import Batch
from treadle.models.base import build
from treadle.models.export import save_for_transformers
from treadle.models.huggingface.config import effective, keys_of
from treadle.models.huggingface.tables import FAMILIES, ONLY, WITHOUT_EFFECT
from treadle.models.transformer import TransformerConfig
from treadle.objectives.base import ModelWithObjective
from treadle.objectives.next_token import NextToken
from treadle.training.optim import Optimizers
from treadle.training.settings import OptimSettings
from treadle.training.step import Stepper


@torch.no_grad()
def our_logits(model: Any, rows: torch.Tensor) -> torch.Tensor:
    return model.eval()(Batch.from_ids(rows)).logits


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_text_are_those_of_transformers(name: str) -> None:
    theirs, folder = written(name)
    ours, rows = treadle.from_pretrained(folder), ids(2, 40)
    wanted = their_logits(theirs, rows)
    assert wanted.std() > 0.3
    torch.testing.assert_close(our_logits(ours, rows), wanted, atol=1e-4, rtol=0)
    prompt = ids(2, 12, seed=2)
    text = theirs.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(prompt, 20, temperature=0.0), text)


@pytest.mark.parametrize("name", CASES)
def test_training_goes_on_and_transformers_reads_the_result(name: str, tmp_path: Path) -> None:
    model, rows = treadle.from_pretrained(written(name)[1]), ids(2, 40)
    stepper = Stepper(ModelWithObjective(model.train(), NextToken()), Optimizers(model, OptimSettings()), seed=0, precision="fp32",
                      max_grad_norm=1.0, loss_weights={})  # fmt: skip
    losses = [stepper.run(step, [Batch.for_training(rows)], 3e-3).loss for step in range(3)]
    assert losses[2] < losses[0] < 1e3
    save_for_transformers(model, tmp_path)
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert again.config.model_type == FAMILIES[model.config.huggingface_family].model_type
    torch.testing.assert_close(their_logits(again, rows), our_logits(model, rows), atol=1e-4, rtol=0)
    assert effective(treadle.from_pretrained(tmp_path).config) == effective(model.config)


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in CASES.values()}))
def test_every_key_of_a_family_is_accounted_for(kind: str) -> None:
    """A key that transformers knows and no table does would be refused in every file that transformers writes."""
    config = getattr(T, f"{kind}Config")()
    family = FAMILIES[config.model_type]
    known = {*family.keys, *family.defaults, *family.only, *ONLY, *WITHOUT_EFFECT, "rope_parameters", "layer_types", "embd_pdrop",
             "original_max_position_embeddings", "_sliding_window_pattern"}  # fmt: skip
    assert set(config.to_dict()) <= known
    shared = {key: value for key, value in family.defaults.items() if hasattr(config, key)}
    fills_in = {"num_key_value_heads", "head_dim", "sliding_window"}  # what its class derives from other keys
    assert {k: v for k, v in shared.items() if k not in fills_in} == {k: getattr(config, k) for k in shared if k not in fills_in}


# Keys as older versions of transformers wrote them, and what they mean.
OLDER: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}),
    ("llama", {"rope_theta": 500.0, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 500.0}),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
     {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}),
    ("phi3", {"partial_rotary_factor": 0.5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "older", "newer"), OLDER, ids=lambda v: str(v)[:30])
def test_both_spellings_of_rotary_positions_mean_the_same(name: str, older: dict, newer: dict) -> None:
    table = json.loads((written(name)[1] / "config.json").read_text())
    del table["rope_parameters"]
    one, other = (TransformerConfig(**keys_of({**table, **keys}, "config.json")) for keys in (older, {"rope_parameters": newer}))
    assert effective(one) == effective(other)


def test_gemma_3_of_older_files() -> None:
    table = json.loads((written("gemma3")[1] / "config.json").read_text())
    wanted = effective(TransformerConfig(**keys_of(table, "config.json")))
    for key in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
        table.pop(key, None)
    table |= {"rope_theta": 500.0, "rope_local_base_freq": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "sliding_window_pattern": 2}
    assert effective(TransformerConfig(**keys_of(table, "config.json"))) == wanted


def test_a_model_made_here_is_written_as_the_family_that_holds_it(tmp_path: Path) -> None:
    shape = {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "initializer_range": 0.2}
    for number, (keys, family) in enumerate([({}, "llama"), ({"style": "gpt2"}, "gpt2"), ({"qk_norm": True}, "qwen3"),
                                             ({"layer_types": ["local"], "sliding_window": 6}, "mistral")]):  # fmt: skip
        model, rows = build("transformer", **shape, **keys), ids(2, 20)
        save_for_transformers(model, tmp_path / str(number))
        theirs = T.AutoModelForCausalLM.from_pretrained(tmp_path / str(number)).eval()
        assert theirs.config.model_type == family
        torch.testing.assert_close(their_logits(theirs, rows), our_logits(model, rows), atol=1e-4, rtol=0)
    none = build("transformer", **shape, style="gpt2", pre_norm=False)  # no family holds it: test_modeling_file.py
    save_for_transformers(none, tmp_path / "none")
    assert (tmp_path / "none/modeling_treadle_transformer.py").is_file()
