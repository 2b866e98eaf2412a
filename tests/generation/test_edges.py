"""What generation has to stand: narrow matrices, models that go away, training mode, padding before a prompt, several threads."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from treadle.errors import ConfigError
from treadle.generation.reading import reading
from treadle.models.base import build
from treadle.ops.packed_linear import native

SHAPE: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "initializer_range": 0.2}
PROMPT = [3, 9, 4, 1, 3, 9, 4]


def model_of(**keys: Any) -> Any:
    return build("transformer", **{**SHAPE, **keys}).eval()


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("keys", [{"num_kv_heads": 1}, {"intermediate_size": 16}, {"hidden_size": 16, "num_heads": 1}])
def test_matrices_too_narrow_for_the_compiled_step(keys: dict[str, Any], weights: str) -> None:
    model = model_of(**keys)
    assert reading(model, weights).form is None
    assert model.generate(PROMPT, 4, temperature=0, weights=weights).shape == (1, 11)


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("keys", [{}, {"style": "gpt2"}, {"layer_types": ["ssd", "attention"]}])
def test_a_model_goes_away_with_what_was_laid_out_for_it(keys: dict[str, Any], weights: str) -> None:
    model = model_of(**keys)
    model.generate(PROMPT, 4, temperature=0, weights=weights)
    model.generate(PROMPT, 4, temperature=0, weights=weights, speculative="ngram")
    alive, parameter = weakref.ref(model), weakref.ref(next(model.parameters()))
    del model
    gc.collect()
    assert alive() is None and parameter() is None


@pytest.mark.parametrize("keys", [{}, {"style": "gpt2"}])
def test_a_model_in_training_generates_what_it_would_in_evaluation(keys: dict[str, Any]) -> None:
    """Without dropout, by the compiled step where there is one; then it trains on."""
    model = model_of(dropout=0.3, **keys)
    for weights in ("fp32", "int8"):
        expected = model.eval().generate(PROMPT, 8, temperature=0, weights=weights)
        model.train()
        assert torch.equal(model.generate(PROMPT, 8, temperature=0, weights=weights), expected)
        assert torch.equal(model.generate(PROMPT, 8, temperature=0, weights=weights, draft=model), expected)
        assert (reading(model, weights).form is not None) == (native() is not None and not keys)
        assert all(module.training for module in model.modules())


def test_padding_stays_before_the_prompt_with_speculation() -> None:
    model, mask = model_of(), [0, 0, *[1] * len(PROMPT)]
    expected = model.generate([0, 0, *PROMPT], 8, temperature=0, attention_mask=mask)
    assert expected[0, : len(mask)].tolist() == [0, 0, *PROMPT]
    for way in ({"speculative": "ngram"}, {"draft": model}):
        assert torch.equal(model.generate([0, 0, *PROMPT], 8, temperature=0, attention_mask=mask, **way), expected)


def test_speculation_is_refused_where_angles_depend_on_how_many_tokens_are_read() -> None:
    model = model_of(rope_scaling={"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=16)
    for way in ({"speculative": "ngram"}, {"draft": model}):
        within = model.generate(PROMPT, 16 - len(PROMPT), temperature=0, **way)
        assert torch.equal(within, model.generate(PROMPT, 16 - len(PROMPT), temperature=0))
        with pytest.raises(ConfigError, match="dynamic"):
            model.generate(PROMPT, 17 - len(PROMPT), temperature=0, **way)
    assert model_of().generate(PROMPT, 30, temperature=0, draft=model).shape == (1, 37)  # a draft's angles change no outcome


def test_a_draft_without_enough_positions_is_refused_before_it_starts() -> None:
    draft = model_of(style="gpt2", max_position_embeddings=16)
    with pytest.raises(ConfigError, match="positions for 16 tokens"):
        model_of().generate(PROMPT, 30, temperature=0, draft=draft)
    assert model_of().generate(PROMPT, 18 - len(PROMPT), temperature=0, draft=draft).shape == (1, 18)


def test_a_seed_beyond_64_bits_is_refused() -> None:
    model = build("transformer", vocab_size=256, hidden_size=16, num_layers=1, num_heads=2)
    seeds: list[Any] = [1 << 64, -(1 << 64), 0.5, True]
    for seed in seeds:
        with pytest.raises(ConfigError, match="64 bits"):
            model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, temperature=1.0, seed=seed)
