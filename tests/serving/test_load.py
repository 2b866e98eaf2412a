"""Many clients at once, some of whom hang up: the others get what they would get alone, and memory comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.serving.conftest import answering, byte_model, served
from tests.serving.test_openai_client import text_of
from treadle.generation.engine import Engine
from treadle.serving.app import App
from treadle.serving.limits import Limits

LONG = Limits(max_prompt_tokens=200, max_new_tokens=3000)
MORE_MEMORY = 1.05  # of the resident memory after the first round


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def crowd(address: str, prompts: list[str], counts: list[int], leaving: set[int]) -> list[str | None]:
    """The text each client got, streamed or whole; None for those that hung up in the middle. (One that means to leave and is not given
    the processor until its whole answer is there has a text.)"""
    draw = random.Random(0)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=120) as http:

        async def one(number: int) -> str | None:
            await asyncio.sleep(draw.random() * 0.3)
            body = {"prompt": prompts[number], "max_tokens": counts[number], "temperature": 0, "stream": number % 3 > 0}
            if number in leaving:  # long enough to be still written when its client leaves
                body |= {"max_tokens": LONG.max_new_tokens, "logit_bias": {"255": -100}}
                if not body["stream"]:
                    with contextlib.suppress(httpx.TimeoutException):
                        return (await http.post("/v1/completions", json=body, timeout=httpx.Timeout(60, read=0.4))).text
                    return None
            if not body["stream"]:
                return (await http.post("/v1/completions", json=body)).json()["choices"][0]["text"]
            parts, lines = [], 0
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        lines += 1
                        parts.append(json.loads(line[6:])["choices"][0]["text"])
                        if number in leaving and lines == 3:
                            return None
            return "".join(parts)

        return await asyncio.gather(*(one(number) for number in range(len(prompts))))


def measured(clients: int, rounds: int) -> list[int]:
    """Serves the crowd several times -> resident memory after each; checks each text against the model alone."""
    model: Any = byte_model()
    engine = Engine(model, rows=16, max_len=LONG.max_len, queue=clients)
    engine.start()
    app, draw, memory = App(engine, served(limits=LONG)), random.Random(1), []
    prompts = ["".join(chr(draw.randrange(97, 123)) for _ in range(draw.randint(1, 60))) for _ in range(clients)]
    counts = [draw.randint(1, 64) for _ in range(clients)]
    leaving = set(range(0, clients, 10))
    left = 0
    alone = [text_of(model.generate(torch.tensor([list(prompt.encode())]), count, temperature=0.0)[0, len(prompt) :].tolist())
             for prompt, count in zip(prompts, counts)]  # fmt: skip
    try:
        with answering(app) as address:
            for _ in range(rounds):
                texts = asyncio.run(crowd(address, prompts, counts, leaving))
                left += texts.count(None)
                for number, text in enumerate(texts):
                    assert number in leaving or text == alone[number], number
                for _ in range(100):
                    if engine.stats()["running"] + engine.stats()["waiting"] == 0:
                        break
                    time.sleep(0.05)
                assert engine.stats()["running"] == engine.stats()["waiting"] == 0
                memory.append(resident())
            assert httpx.post(f"{address}/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
            for _ in range(100):  # an answer counts when its task ends, a moment after its rows are free
                if app.counts["hung_up"] >= 0.8 * left:
                    break
                time.sleep(0.05)
            assert left > 0 and app.counts["hung_up"] >= 0.8 * left
            asked = rounds * sum(counts[number] for number in range(clients) if number not in leaving)
            assert engine.stats()["generated_tokens"] - asked < rounds * len(leaving) * LONG.max_new_tokens / 2  # they were not written to their end
    finally:
        engine.stop(finish=False)
    return memory


def test_forty_clients_of_whom_four_hang_up() -> None:
    measured(40, 1)


@pytest.mark.slow
def test_two_hundred_clients_of_whom_twenty_hang_up() -> None:
    memory = measured(200, 4)
    assert max(memory[1:]) <= memory[0] * MORE_MEMORY, memory
    print("resident MB after each round", [round(size / 1e6, 1) for size in memory])
