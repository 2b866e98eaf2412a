"""Continuous batching: what a request gets is what it would get alone, whatever comes and goes beside it."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest
import torch

from tests.contracts.conftest import make
from treadle.generation.engine import Engine, Request, Token
from treadle.generation.sampling import Sampling
from treadle.generation.slots import DenseSlots

GREEDY = Sampling(temperature=0.0)
MODELS = [("transformer", 0), ("transformer", 6), ("hnet", 0), ("hgrn_bit", 0), ("shc", 0), ("ssm", 0)]


class Heard:
    """What came back of one request."""

    def __init__(self, engine: Engine, prompt: list[int], count: int, stop_after: int | None = None, **more: Any) -> None:
        self.tokens: list[Token] = []
        self.reasons: list[str] = []
        self.ended = threading.Event()
        self.stop_after = stop_after
        more.setdefault("sampling", GREEDY)
        self.ticket = engine.submit(Request(prompt, count, on_token=self._token, on_end=self._end, **more))

    def _token(self, token: Token) -> bool:
        self.tokens.append(token)
        return self.stop_after == len(self.tokens)

    def _end(self, reason: str) -> None:
        self.reasons.append(reason)
        self.ended.set()

    def wait(self) -> Heard:
        assert self.ended.wait(60), "the request never ended"
        return self

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


def alone(model: Any, prompt: list[int], count: int, sampling: Sampling = GREEDY, seed: int = 0) -> list[int]:
    return model.generate(torch.tensor([prompt]), count, seed=seed, **vars(sampling))[0, len(prompt) :].tolist()


def prompts(count: int, longest: int, vocabulary: int = 61, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(vocabulary) for _ in range(draw.randint(1, longest))] for _ in range(count)]


@pytest.fixture(params=[*MODELS, "compiled"], ids=lambda p: p if isinstance(p, str) else f"{p[0]}-{p[1]}")
def model(request: pytest.FixtureRequest) -> Any:
    if request.param == "compiled":
        return make("transformer", 0, hidden_size=64, num_heads=4, num_kv_heads=2, num_layers=2).eval()
    return make(*request.param).eval()


def test_many_requests_with_cancels_get_what_they_get_alone(model: Any) -> None:
    draw = random.Random(1)
    engine = Engine(model, rows=4, max_len=64, prompt_tokens=8)
    assert (type(engine._slots) is DenseSlots) == (model.width == 64)
    engine.start()
    settings = [GREEDY, Sampling(0.8, 10, 0.9), Sampling(1.0, 0, 1.0, 1.3), Sampling(0.7, 5, 1.0)]
    asked, kept = [], []
    for number, prompt in enumerate(prompts(30, 24)):
        sampling, count = settings[number % 4], draw.randint(1, 24)
        heard = Heard(engine, prompt, count, sampling=sampling, seed=number)
        asked.append(heard)
        if number % 5 == 4:
            time.sleep(draw.random() * 0.02)
            draw.choice(asked).ticket.cancel()
        kept.append((heard, prompt, count, sampling, number))
    for heard, prompt, count, sampling, seed in kept:
        heard.wait()
        expected = alone(model, prompt, count, sampling, seed)
        assert len(heard.reasons) == 1
        if heard.reasons == ["cancelled"]:
            assert heard.ids == expected[: len(heard.ids)]
        else:
            assert (heard.reasons, heard.ids) == (["length"], expected)
    assert engine.stop(timeout=30)
    stats = engine.stats()
    assert (stats["running"], stats["waiting"]) == (0, 0)
    assert stats["generated_tokens"] == sum(len(heard.ids) for heard in asked)
