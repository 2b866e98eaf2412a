"""Speculation changes the speed alone: greedily the same tokens, else the same distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.generation.sampling import Sampling, next_ids, probabilities
from treadle.generation.speculation import NGrams, judged
from treadle.models.base import build

SHAPE: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "initializer_range": 0.3}


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    return build("transformer", **SHAPE).eval()


@pytest.fixture(scope="module")
def draft(model):  # type: ignore[no-untyped-def]
    """Often right: the same model with some noise."""
    near = build("transformer", **SHAPE).eval()
    with torch.no_grad():
        for p in near.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.03)
    return near


PROMPT = [3, 9, 4, 1, 3, 9, 4, 2, 7]


@pytest.mark.parametrize("weights", ["fp32", "int4"])
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedily_the_same_tokens(model, draft, weights: str, penalty: float) -> None:  # type: ignore[no-untyped-def]
    options: dict[str, Any] = {"temperature": 0, "repetition_penalty": penalty, "weights": weights}
    plain = model.generate(PROMPT, 40, **options)
    for way in ({"speculative": "ngram"}, {"draft": draft}, {"draft": model}):
        counted: dict[str, int] = {}
        assert torch.equal(model.generate(PROMPT, 40, statistics=counted, **way, **options), plain)
        assert counted["steps"] + counted["kept"] == 39
        if way.get("draft") is model:
            assert counted["kept"] == counted["proposed"] > 25


@pytest.mark.parametrize("keys", [{"layer_types": ["ssd", "attention"]}, {"style": "gpt2"}, {"sliding_window": 6, "layer_types": ["sliding_attention"]}])
def test_models_without_a_compiled_step(keys: dict[str, Any]) -> None:
    """Also those whose state cannot go back and is copied instead."""
    other = build("transformer", **{**SHAPE, **keys}).eval()
    plain = other.generate(PROMPT, 40, temperature=0)
    for way in ({"speculative": "ngram"}, {"draft": other}):
        assert torch.equal(other.generate(PROMPT, 40, temperature=0, **way), plain)  # type: ignore[arg-type]


def frequencies(draws: list[int], vocabulary: int) -> torch.Tensor:
    return torch.bincount(torch.tensor(draws), minlength=vocabulary) / len(draws)


@pytest.mark.parametrize("certain", [True, False])
def test_what_is_kept_or_drawn_instead_has_the_models_distribution(certain: bool) -> None:
    """Of the first place, over many draws; p and q far apart, with limits."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.tensor([[1.0, 0.5, 0.0, -0.5, -3.0, 0.2]]).repeat(2, 1)
    guess_logits = torch.tensor([[-1.0, 1.0, 1.5, 0.0, 0.0, -2.0]])
    for sampling in (Sampling(0.8, 0, 1.0), Sampling(1.0, 4, 0.9)):
        want, q = (probabilities(part, None, sampling)[0] for part in (logits[:1], guess_logits))
        draws, kept_in_all, count = [], 0, 3000
        for _ in range(count):
            token = 2 if certain else int(torch.multinomial(q, 1, generator=generator))
            kept, after = judged([token], None if certain else [q], logits, None, sampling, generator)
            draws.append(token if kept else after)
            kept_in_all += kept
        # Three standard deviations of the worst share.
        torch.testing.assert_close(frequencies(draws, 6), want, atol=3 * (0.25 / count) ** 0.5, rtol=0)
        expected = float(want[2]) if certain else float(torch.minimum(want, q).sum())
        assert abs(kept_in_all / count - expected) < 0.03


def test_probabilities_are_what_is_drawn_from() -> None:
    logits = torch.randn(1, 7, generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([[True, False, False, True, False, False, True]])
    for sampling in (Sampling(0.0, repetition_penalty=2.0), Sampling(0.7, 3, 1.0), Sampling(1.3, 0, 0.8, 1.5)):
        generator = torch.Generator().manual_seed(1)
        draws = next_ids(logits.expand(20_000, 7), seen.expand(20_000, 7), sampling, generator)
        torch.testing.assert_close(frequencies(draws.tolist(), 7), probabilities(logits, seen, sampling)[0], atol=0.011, rtol=0)


@pytest.mark.parametrize("way", ["ngram", "draft"])
def test_pairs_of_sampled_tokens_have_the_models_distribution(way: str) -> None:
    """The second and third token of many generations against products of conditional probabilities: what a wrong state after a
    rejection, or a wrong remainder, would change."""
    tiny = build("transformer", **{**SHAPE, "vocab_size": 4, "num_layers": 1}).eval()
    near = build("transformer", **{**SHAPE, "vocab_size": 4, "num_layers": 1}, seed=0).eval()
    with torch.no_grad():
        near.head.weight.add_(torch.randn(near.head.weight.shape, generator=torch.Generator().manual_seed(2)) * 0.4)
    options: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "temperature": 1.5}
    speculation: dict[str, Any] = {"speculative": "ngram"} if way == "ngram" else {"draft": near}
    count, counted = 500, {}
    found = torch.zeros(64)
    for seed in range(count):
        a, b, c = tiny.generate([1, 2, 3, 1, 2], 3, seed=seed, statistics=counted, **speculation, **options)[0, 5:].tolist()
        found[16 * a + 4 * b + c] += 1
    want = torch.zeros(64)
    sampling = Sampling(1.5, 0, 1.0)
    for first in range(4):
        for second in range(4):
            with torch.no_grad():
                logits = tiny(Batch.from_ids([[1, 2, 3, 1, 2, first, second]])).logits[0]
            p = probabilities(logits[4:], None, sampling)
            want[16 * first + 4 * second : 16 * first + 4 * second + 4] = p[0, first] * p[1, second] * p[2]
    statistic = float(((found - count * want) ** 2 / (count * want)).sum())
    assert statistic < 63 + 4 * (2 * 63) ** 0.5  # chi-squared of 63 degrees: mean 63, deviation 11.2
    assert 0 < counted["kept"] < counted["proposed"]


def test_ngrams_propose_what_followed() -> None:
    grams = NGrams()
    assert grams.propose([1, 2, 3, 9, 1, 2], 3) == ([3, 9, 1], None)
    assert grams.propose([1, 2, 3, 9, 1, 2, 8, 1, 2], 2) == ([8, 1], None)  # the latest occurrence
    assert grams.propose([1, 2, 3, 9, 1, 2, 8, 1, 2, 5], 2) == ([], None)
    assert NGrams().propose([6, 7, 6, 7], 5)[0] == [6, 7, 6, 7, 6]


def test_what_does_not_go_together(model) -> None:  # type: ignore[no-untyped-def]
    for options, says in (({"speculative": "magic"}, "ngram"), ({"speculative": "ngram", "draft": model}, "exclude"),
                          ({"draft": build("transformer", **{**SHAPE, "vocab_size": 41})}, "41")):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            model.generate([1, 2], 3, **options)
    with pytest.raises(ConfigError, match="one row"):
        model.generate([[1, 2], [3, 4]], 3, speculative="ngram")
    eos = int(model.generate(PROMPT, 30, temperature=0)[0, -1])
    plain = model.generate(PROMPT, 30, temperature=0, eos_id=eos)
    assert torch.equal(model.generate(PROMPT, 30, temperature=0, eos_id=eos, speculative="ngram"), plain)
