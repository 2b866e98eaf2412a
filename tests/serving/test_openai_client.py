"""The official openai package as the client of a real engine over a tiny byte model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from treadle.data.batch import Batch

openai = pytest.importorskip("openai", reason="the openai package is not installed")


@pytest.fixture(scope="module")
def api(real: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{real[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def greedy(model: Any, prompt: bytes, count: int) -> list[int]:
    return model.generate(torch.tensor([list(prompt)]), count, temperature=0.0)[0, len(prompt) :].tolist()


def text_of(ids: list[int]) -> str:
    ids = ids[: ids.index(255)] if 255 in ids else ids
    return bytes(token for token in ids if token < 254).decode("utf-8", "replace").removesuffix("\ufffd")


def test_models(api: Any) -> None:
    assert [model.id for model in api.models.list()] == ["tiny"]
    assert api.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("other")


def test_a_greedy_completion_is_what_the_model_writes(api: Any, real: Any) -> None:
    answer = api.completions.create(model="tiny", prompt="The wheel", max_tokens=30, temperature=0, logprobs=3)
    ids = greedy(real[2], b"The wheel", 30)
    assert answer.choices[0].text == text_of(ids)
    assert answer.usage.prompt_tokens == 9
    with torch.inference_mode():
        logits = real[2](Batch.from_ids(torch.tensor([[*b"The wheel", *ids]]))).logits[0, 8:-1].log_softmax(-1)
    wanted = [float(logits[place, token]) for place, token in enumerate(ids)]
    got = answer.choices[0].logprobs
    assert got.token_logprobs == pytest.approx(wanted[: len(got.tokens)], abs=1e-4)
    assert len(got.top_logprobs[0]) == 3 and max(got.top_logprobs[0].values()) == pytest.approx(float(logits[0].max()), abs=1e-4)


def test_streams_and_seeds(api: Any) -> None:
    asked = {"model": "tiny", "prompt": "The wheel", "max_tokens": 40, "seed": 7}
    whole = api.completions.create(**asked)
    parts = list(api.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text
    assert parts[-1].usage == whole.usage and parts[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert api.completions.create(**{**asked, "seed": 8}).choices[0].text != whole.choices[0].text


def test_n_of_one_seed_are_as_seeds_one_after_another(api: Any) -> None:
    asked = {"model": "tiny", "prompt": "ab", "max_tokens": 20}
    several = api.completions.create(**asked, n=3, seed=5)
    alone = [api.completions.create(**asked, seed=5 + copy).choices[0].text for copy in range(3)]
    assert [choice.text for choice in several.choices] == alone


def test_a_chat_with_probabilities(api: Any) -> None:
    answer = api.chat.completions.create(model="tiny", messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
                                         max_completion_tokens=12, logprobs=True, top_logprobs=2, temperature=0.5, top_p=0.9, seed=1)  # fmt: skip
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and answer.usage.completion_tokens == len(choice.logprobs.content)
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 and math.isfinite(one.logprob) for one in choice.logprobs.content)


def test_a_chat_in_a_stream_of_two_with_a_stop(api: Any) -> None:
    """Each of two copies ends where its own text first holds the stop, which no piece of the stream shows a part of."""
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 40, "seed": 5, "n": 2,
             "logit_bias": {str(token): 60 for token in b"abcdefgh"}}  # fmt: skip
    free = [choice.message.content for choice in api.chat.completions.create(**asked).choices]
    stop = next(free[0][at : at + 2] for at in range(8, 38) if free[0].find(free[0][at : at + 2]) == at)  # first said there
    asked["stop"] = [stop, "never said"]
    whole = api.chat.completions.create(**asked)
    assert [choice.message.content for choice in whole.choices] == [text.partition(stop)[0] for text in free] and free[0] != free[1]
    assert [choice.finish_reason == "stop" for choice in whole.choices] == [stop in text for text in free] and stop in free[0]
    parts = list(api.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert parts[-1].choices == [] and parts[-1].usage == whole.usage and len({part.id for part in parts}) == 1
    for choice in whole.choices:
        own = [one for part in parts for one in part.choices if one.index == choice.index]
        assert own[0].delta.role == "assistant" and len(own) > (4 if choice.index == 0 else 1)
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + [choice.finish_reason]


def test_logit_bias_forces_and_bans(api: Any) -> None:
    asked = {"model": "tiny", "prompt": "ab", "max_tokens": 6, "temperature": 0}
    assert api.completions.create(**asked, logit_bias={"122": 100}).choices[0].text == "zzzzzz"
    stopped = api.completions.create(**asked, logit_bias={"122": 100}, stop="zzz")
    assert stopped.choices[0].text == "" and stopped.choices[0].finish_reason == "stop" and stopped.usage.completion_tokens == 3
    first = api.completions.create(**asked, logprobs=1)
    token = greedy_first(first)
    assert greedy_first(api.completions.create(**asked, logprobs=1, logit_bias={str(token): -100})) != token


def greedy_first(answer: Any) -> int:
    name = answer.choices[0].logprobs.tokens[0]
    return int(name[-2:], 16) if name.startswith("bytes:") else ord(name)


def test_errors_are_the_clients_own_classes(api: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="max-new-tokens"):
        api.completions.create(model="tiny", prompt="a", max_tokens=1000)
    with pytest.raises(openai.NotFoundError, match="tiny"):
        api.completions.create(model="gpt", prompt="a")


def test_the_asynchronous_client(real: Any, api: Any) -> None:
    async def several() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{real[0]}/v1", api_key="none", max_retries=0) as client:
            async def one(number: int) -> str:
                stream = await client.completions.create(model="tiny", prompt=f"row {number}", max_tokens=20 + number, temperature=0, stream=True)
                return "".join([part.choices[0].text async for part in stream])

            return await asyncio.gather(*(one(number) for number in range(12)))

    texts = asyncio.run(several())
    assert texts == [text_of(greedy(real[2], f"row {number}".encode(), 20 + number)) for number in range(12)]
