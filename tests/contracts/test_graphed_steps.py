"""Steps of decoding by a graph, with the graph's place taken by the work it would repeat: every architecture's state stays where it
is, through caches that grow, rows that rest and rows that are replaced. On a GPU, test_on_a_gpu.py."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch

from treadle.data.batch import Batch
from treadle.generation import slots, steps
from treadle.generation.engine import Engine, Request
from treadle.generation.sampling import Sampling
from treadle.generation.steps import PLAIN, GraphedSteps, Steps
from treadle.layers.state import State
from treadle.models.base import Model

from .conftest import make, needs, random_ids


@pytest.fixture(autouse=True)
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is recorded is run again; how often something was."""
    recorded: list[int] = []

    def record(work):  # type: ignore[no-untyped-def]
        recorded.append(1)
        return work

    inside: list[bool] = []

    def watched(work):  # type: ignore[no-untyped-def]
        inside.append(True)
        try:
            return work(), False
        finally:
            inside.clear()

    def padding(rows, running, made=steps._padding):  # type: ignore[no-untyped-def]
        assert not inside, "what the host brings to a GPU makes it wait, which is no fault of the model's"
        return made(rows, running)

    monkeypatch.setattr(steps, "record", record)
    monkeypatch.setattr(steps, "watched", watched)
    monkeypatch.setattr(steps, "_padding", padding)
    monkeypatch.setattr(steps, "SPAN", 8)
    return recorded


@torch.inference_mode()
def test_the_state_stays_where_it_is(model: Model, repeated: list[int]) -> None:
    needs(model, "decodes")
    ids, ways = random_ids(3, 5), [Steps(model), GraphedSteps(model)]
    states = [model.hidden(Batch.from_ids(ids), model.new_state(3, 40)).state for _ in ways]
    other = model.hidden(Batch.from_ids(random_ids(1, 7, seed=9)), model.new_state(1, 40)).state
    if type(states[0]) is not State:
        pytest.skip(f"{model.arch} keeps a state of its own, which steps kernel by kernel")
    running = {1: [0, 2], 4: [0, 2], 5: [2, 0], 6: [1], 12: [1, 2]}
    for step in range(24):
        if step == 9:  # row 1 ends, and another takes its place
            for state in states:
                state.put([1], other.clone())
        new, found = random_ids(1, 3, seed=step)[0], []
        for number, way in enumerate(ways):
            logits, states[number] = way(new, states[number], running.get(step))
            found.append(logits)
        torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4, msg=f"step {step}")
        assert states[0].host_lengths == states[1].host_lengths and torch.equal(states[0].lengths, states[1].lengths)
    assert PLAIN + len(repeated) < 24 and len(repeated) >= 3  # one for each length of the caches, with and without rows that rest


@torch.inference_mode()
def test_a_state_of_other_rows_begins_anew(model: Model, repeated: list[int]) -> None:
    needs(model, "decodes")
    way, plain = GraphedSteps(model), Steps(model)
    for rows in (2, 1):
        states = [model.hidden(Batch.from_ids(random_ids(rows, 3)), model.new_state(rows, 20)).state for _ in range(2)]
        for step in range(6):
            ids = random_ids(1, rows, seed=step)[0]
            logits, states[0] = way(ids, states[0])
            wanted, states[1] = plain(ids, states[1])
            torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_host_that_waits_keeps_to_kernels(model: Model, repeated: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    needs(model, "decodes")
    monkeypatch.setattr(steps, "watched", lambda work: (work(), True))
    way, state = GraphedSteps(model), model.hidden(Batch.from_ids(random_ids(2, 3)), model.new_state(2, 20)).state
    for step in range(6):
        _, state = way(random_ids(1, 2, seed=step)[0], state)
    assert not repeated


@torch.inference_mode()
def test_what_cannot_be_recorded_goes_on_by_kernels(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(model, "decodes")

    def refuse(work):  # type: ignore[no-untyped-def]
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(steps, "record", refuse)
    ways = [Steps(model), GraphedSteps(model)]
    states = [model.hidden(Batch.from_ids(random_ids(2, 3)), model.new_state(2, 20)).state for _ in ways]
    warned = 0
    for step in range(6):
        ids, found = random_ids(1, 2, seed=step)[0], []
        for number, way in enumerate(ways):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                logits, states[number] = way(ids, states[number])
            warned += sum("kernel by kernel" in str(warning.message) for warning in said)
            found.append(logits)
        torch.testing.assert_close(found[1], found[0], atol=0, rtol=0)
    assert warned == 1 and states[0].host_lengths == states[1].host_lengths


@pytest.mark.parametrize("arch", ["shc", "ssm", "hgrn_bit"])
def test_an_engine_whose_rows_come_and_go(arch: str, repeated: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(arch).eval()
    monkeypatch.setattr(slots, "steps_of", GraphedSteps)
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (3, 9, 1, 14, 6)]
    written: list[list[int]] = [[] for _ in prompts]
    ended = [threading.Event() for _ in prompts]
    engine = Engine(model, rows=3, max_len=64)
    for number, prompt in enumerate(prompts):
        engine.submit(Request(prompt, 14 + 5 * number, Sampling(temperature=0.0), on_token=lambda t, n=number: written[n].append(t.id),  # type: ignore[misc]
                              on_end=lambda why, n=number: ended[n].set()))  # type: ignore[misc]
    engine.start()
    try:
        assert all(event.wait(60) for event in ended)
    finally:
        engine.stop()
    assert repeated, "nothing was recorded"
    for number, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), 14 + 5 * number, temperature=0.0)
        assert written[number] == alone[0, len(prompt) :].tolist()
