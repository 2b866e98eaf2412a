"""Continuous batching: what a request gets is what it would get alone, whatever comes and goes beside it."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contracts.conftest import make
from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.generation.engine import Engine, EngineStopped, QueueFull, Request, Token
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
    settings = [GREEDY, Sampling(0.8, 10, 0.9), Sampling(0.0, repetition_penalty=3.0), Sampling(0.7, 5, 1.0)]
    asked, kept = [], []
    for number, prompt in enumerate(prompts(30, 20)):
        sampling, count = settings[number % 4], draw.randint(1, 12)
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


def small(**more: Any) -> Any:
    return make("hgrn_bit", 1, **more).eval()


@pytest.fixture()
def engine() -> Iterator[Engine]:
    made = Engine(small(), rows=2, max_len=32, queue=3)
    yield made
    assert made.stop(finish=False, timeout=30)


def test_a_request_ends_at_its_stop_ids_and_where_its_listener_says(engine: Engine) -> None:
    prompt = prompts(1, 8)[0]
    engine.start()
    whole = Heard(engine, prompt, 12).wait().ids
    stop = next(token for token in whole if token != whole[0])
    ended = Heard(engine, prompt, 12, stop_ids=frozenset({stop})).wait()
    assert (ended.ids, ended.reasons) == (whole[: whole.index(stop)], ["stop"])
    told = Heard(engine, prompt, 12, stop_after=3).wait()
    assert (told.ids, told.reasons) == (whole[:3], ["stop"])


def test_log_probabilities_are_of_the_raw_logits_and_biases_move_the_choice(engine: Engine) -> None:
    prompt = prompts(1, 8)[0]
    engine.start()
    plain = Heard(engine, prompt, 4, logprobs=3, sampling=Sampling(temperature=2.0), seed=3).wait()
    ids = torch.tensor([prompt + plain.ids])
    with torch.no_grad():
        expected = engine._model(Batch.from_ids(ids)).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    for token, row in zip(plain.tokens, expected):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [t for t, _ in token.top] == row.topk(3).indices.tolist()
        assert [p for _, p in token.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    forced = Heard(engine, prompt, 3, logit_bias={7: 1e4}, logprobs=0).wait()
    assert forced.ids == [7, 7, 7]
    assert forced.tokens[0].top == [] and forced.tokens[0].logprob < -0.5  # what the model said, not the bias
    banned = Heard(engine, prompt, 3, logit_bias=dict.fromkeys(range(60), -math.inf), sampling=Sampling(top_k=0, top_p=1.0)).wait()
    assert banned.ids == [60, 60, 60]
    assert math.isnan(Heard(engine, prompt, 1).wait().tokens[0].logprob)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"prompt_ids": []}, "empty"), ({"prompt_ids": [61]}, "outside 0..60"), ({"prompt_ids": [-1]}, "outside"), ({"max_new_tokens": 0}, ">= 1"),
     ({"max_new_tokens": 31}, "together 33; a row holds 32"), ({"logprobs": -1}, "logprobs"), ({"logit_bias": {61: 1.0}}, "token 61"),
     ({"logit_bias": {1: math.nan}}, "token 1 is nan"), ({"logit_bias": {1: math.inf}}, "token 1 is inf"), ({"seed": 1 << 64}, "64 bits")],
)  # fmt: skip
def test_what_can_never_run_is_refused_at_once(engine: Engine, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.submit(Request(**{"prompt_ids": [1, 2], "max_new_tokens": 4, **change}))
    assert engine.stats()["waiting"] == 0


def test_learned_positions_bound_a_row() -> None:
    engine = Engine(make("transformer", 1), max_len=4096)
    assert engine.max_len == 64
    with pytest.raises(ConfigError, match="positions for 64"):
        engine.submit(Request([1], 64))


def test_a_full_queue_says_when_to_come_back_and_cancelling_makes_room(engine: Engine) -> None:
    waiting = [Heard(engine, [1, 2], 20) for _ in range(3)]  # not started: all wait
    with pytest.raises(QueueFull) as refused:
        Heard(engine, [1], 1)
    assert 1 <= refused.value.retry_after <= 60
    waiting[1].ticket.cancel()
    last = Heard(engine, [3], 2)
    engine.start()
    assert waiting[1].wait().reasons == ["cancelled"] and waiting[1].ids == []
    assert last.wait().reasons == waiting[0].wait().reasons == waiting[2].wait().reasons == ["length"]
    waiting[0].ticket.cancel()  # has ended: nothing more is said
    assert waiting[0].reasons == ["length"]


def test_cancelling_frees_a_row_at_the_next_step(engine: Engine) -> None:
    engine.start()
    made, begun = [0, 0], threading.Event()

    def slow(number: int, token: Token) -> None:
        made[number] += 1
        begun.set()
        time.sleep(0.02)

    tickets = [engine.submit(Request([1], 31, GREEDY, on_token=partial(slow, number))) for number in range(2)]
    begun.wait()
    behind = Heard(engine, [2], 2)
    for ticket in tickets:
        ticket.cancel()
    at_once = list(made)
    assert behind.wait().reasons == ["length"]
    assert all(after <= before + 2 for before, after in zip(at_once, made)), (at_once, made)


def test_a_listener_that_fails_ends_its_own_request_alone(engine: Engine) -> None:
    engine.start()
    ended: list[str] = []

    def fails(_: Any) -> bool:
        raise KeyError("no such thing")

    def fails_at_the_end(reason: str) -> None:
        ended.append(reason)
        raise ValueError(reason)

    engine.submit(Request([1], 5, GREEDY, on_token=fails, on_end=fails_at_the_end))
    good = Heard(engine, [4, 5], 6).wait()
    assert good.reasons == ["length"] and good.ids == alone(engine._model, [4, 5], 6)
    assert ended == ["error: 'no such thing'"]


def test_a_prompt_that_fails_ends_its_own_request_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    read = engine._slots.read

    def sometimes(place: Any, ids: list[int], extras: Any) -> Any:
        if ids == [9, 9]:
            raise RuntimeError("no memory")
        return read(place, ids, extras)

    monkeypatch.setattr(engine._slots, "read", sometimes)
    monkeypatch.setattr(engine._slots, "read_together", lambda *_: sometimes(None, [9, 9], {}))
    bad, good = Heard(engine, [9, 9], 5), Heard(engine, [4, 5], 6)
    engine.start()
    assert bad.wait().reasons == ["error: no memory"]
    assert good.wait().ids == alone(engine._model, [4, 5], 6)


def test_a_step_that_fails_and_an_engine_that_fails_leave_a_working_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("the machine is tired")

    with monkeypatch.context() as patch:
        patch.setattr(engine._slots, "step", broken)
        bad = [Heard(engine, [1], 5), Heard(engine, [2], 5)]
        engine.start()
        assert [heard.wait().reasons for heard in bad] == [["error: the machine is tired"]] * 2
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_choose", broken)
        assert Heard(engine, [1], 5).wait().reasons == ["error: the machine is tired"]
    assert Heard(engine, [4, 5], 6).wait().ids == alone(engine._model, [4, 5], 6)


def test_an_engine_that_cannot_go_on_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting anew fails as well, for want of memory: who waits hears of it, and nothing new is taken."""
    made = Engine(small(), rows=2, max_len=32, queue=3)

    def broken(*_: Any, **__: Any) -> Any:
        raise MemoryError("no memory")

    monkeypatch.setattr(made, "_choose", broken)
    monkeypatch.setattr("treadle.generation.engine.slots_of", broken)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    waiting = [Heard(made, [1], 5) for _ in range(3)]
    made.start()
    assert [heard.wait().reasons for heard in waiting] == [["error: no memory"]] * 2 + [["cancelled"]]
    assert made.stop(timeout=30)
    with pytest.raises(EngineStopped):
        Heard(made, [1], 5)


def test_logits_that_are_no_numbers_end_the_row() -> None:
    model = small()
    with torch.no_grad():
        model.embedding.weight[5] = math.nan
    engine = Engine(model, rows=4, max_len=32)
    engine.start()
    bad, good = Heard(engine, [5], 5), Heard(engine, [4], 5, sampling=Sampling())
    assert bad.wait().reasons == ["error: the model's logits are not finite numbers"]
    assert good.wait().reasons == ["length"]
    engine.stop()


def test_stopping_finishes_what_was_taken_or_cancels_it() -> None:
    engine = Engine(small(), rows=2, max_len=32)
    taken = [Heard(engine, [number], 10) for number in range(6)]
    engine.start()
    assert engine.stop(finish=True, timeout=30)
    assert [heard.reasons for heard in taken] == [["length"]] * 6
    with pytest.raises(EngineStopped):
        engine.submit(Request([1], 1))
    engine = Engine(small(), rows=2, max_len=32)
    taken = [Heard(engine, [number], 30) for number in range(6)]
    engine.start()
    assert engine.stop(finish=False, timeout=30)
    assert all(len(heard.reasons) == 1 and heard.reasons[0] in ("cancelled", "length") for heard in taken)
    assert taken[-1].reasons == ["cancelled"]
    never = Engine(small())
    heard = Heard(never, [1], 5)
    assert never.stop() and heard.reasons == ["cancelled"]


def test_an_idle_engine_sleeps_and_its_state_shrinks(engine: Engine) -> None:
    engine.start()
    for heard in [Heard(engine, [number], 6) for number in range(3)]:
        heard.wait()
    deadline = time.monotonic() + 10
    while engine.stats()["running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats()["state_bytes"] == 0
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.15


def test_a_long_prompt_is_read_in_parts_while_others_go_on() -> None:
    engine = Engine(small(), rows=2, max_len=256, prompt_tokens=16)
    order: list[str] = []
    done = threading.Event()
    engine.submit(Request([1], 24, GREEDY, on_token=lambda token: order.append("short")))
    engine.submit(Request([2] * 200, 1, GREEDY, on_token=lambda token: order.append("long"), on_end=lambda reason: done.set()))
    engine.start()
    assert done.wait(30)
    assert 10 <= order.index("long") <= 14  # 200 tokens in 13 parts, with a step of the other behind each
    engine.stop()


def test_prompts_that_come_together_are_read_a_bounded_number_of_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(small(), rows=8, max_len=64, prompt_tokens=16)
    turns: list[int] = []
    read = engine._read_prompts

    def counted() -> Any:
        before = engine.stats()["prompt_tokens"]
        done = read()
        turns.append(engine.stats()["prompt_tokens"] - before)
        return done

    monkeypatch.setattr(engine, "_read_prompts", counted)
    asked = [Heard(engine, [number] * length, 2) for number, length in enumerate((7, 7, 5, 20, 3))]
    engine.start()
    assert all(heard.wait().reasons == ["length"] for heard in asked)
    assert turns[:4] == [14, 5, 16, 7]  # 7 and 7; 5, as 16 of the 20 do not fit; those 16; the other 4 and 3
    engine.stop()


def test_a_source_comes_with_the_prompt() -> None:
    model = make("encoder_decoder", 0).eval()
    engine = Engine(model, rows=3, max_len=32)
    sources = [torch.arange(3 + number, 10 + number)[None] for number in range(3)]
    asked = [Heard(engine, [1, 2 + number], 8, extras={"source": source}) for number, source in enumerate(sources)]
    engine.start()
    for number, heard in enumerate(asked):
        expected = model.generate(torch.tensor([[1, 2 + number]]), 8, temperature=0, extras={"source": sources[number]})
        assert heard.wait().ids == expected[0, 2:].tolist()
    engine.stop()


def test_a_process_ends_while_its_engine_computes(tmp_path: Path) -> None:
    script = tmp_path / "leaves.py"
    script.write_text(
        "import treadle\nfrom treadle.generation.engine import Engine, Request\n"
        "model = treadle.build('transformer', hidden_size=64, num_layers=2, num_heads=2, vocab_size=64)\n"
        "engine = Engine(model, rows=4, max_len=100000)\n"
        "import threading\nbegun = threading.Event()\n"
        "for number in range(4):\n    engine.submit(Request([number], 90000, on_token=lambda token: begun.set()))\n"
        "engine.start()\nbegun.wait()\n"
    )
    done = subprocess.run([sys.executable, str(script)], timeout=60, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert (done.returncode, done.stderr) == (0, "")


def test_two_hundred_requests_and_those_that_leave_cost_the_others_nothing() -> None:
    model = small()
    engine = Engine(model, rows=16, max_len=64)
    engine.start()

    def load() -> list[tuple[Heard, list[int], int]]:
        draw, asked = random.Random(5), []
        for number, prompt in enumerate(prompts(200, 12, seed=4)):
            count = draw.randint(2, 10)
            heard = Heard(engine, prompt, count)
            if number % 10 == 0:
                heard.ticket.cancel()
            asked.append((heard, prompt, count))
        for heard, _, _ in asked:
            heard.wait()
        return asked

    load()
    before = resident()
    for heard, prompt, count in load():
        if heard.reasons != ["cancelled"]:
            assert (heard.reasons, heard.ids) == (["length"], alone(model, prompt, count))
    assert engine.stop(timeout=30) and engine.stats()["state_bytes"] == 0
    assert resident() <= 1.05 * before


def resident() -> int:
    """Bytes of this process that are in memory, on Linux."""
    table = Path("/proc/self/statm")
    return int(table.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if table.is_file() else 0
