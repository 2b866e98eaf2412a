"""Generation with a model in training: dropout is off in every thread, and each module has its own mode afterwards."""

from __future__ import annotations

import threading
from typing import Any

import torch

from treadle.generation.mode import evaluating
from treadle.models.base import build

PROMPT = list(range(10))


def dropping(**keys: Any) -> Any:
    shape = {"vocab_size": 97, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "dropout": 0.5, "initializer_range": 0.3}
    return build("transformer", seed=1, **{**shape, "layer_types": ["sliding_attention", "attention"], "sliding_window": 8, **keys})


def test_one_thread_ends_while_another_writes() -> None:
    model = dropping()
    expected = model.generate(PROMPT, 20, temperature=0)
    inside, go_on, found = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()], []

    def write(number: int, count: int) -> None:
        def waits(_: torch.Tensor) -> None:
            inside[number].set()
            assert go_on[number].wait(30)

        found.append(model.generate(PROMPT, count, temperature=0, on_ids=waits))

    threads = [threading.Thread(target=write, args=given) for given in ((0, 2), (1, 20))]
    for thread, event in zip(threads, inside):
        thread.start()
        assert event.wait(30)
    for thread, event in zip(threads, go_on):
        event.set()
        thread.join(30)
        assert model.training == (thread is threads[1])
    assert torch.equal(found[1], expected) and torch.equal(found[0], expected[:, :12])


def test_modules_have_their_own_modes_again() -> None:
    for keys in ({}, {"layer_types": None, "sliding_window": None}):
        model = dropping(**keys)
        model.layers[0].eval()
        before = {name: part.training for name, part in model.named_modules()}
        model.generate(PROMPT, 2)
        assert {name: part.training for name, part in model.named_modules()} == before
        model.eval().layers[1].train()
        before = {name: part.training for name, part in model.named_modules()}
        model.generate(PROMPT, 2, draft=model)
        assert {name: part.training for name, part in model.named_modules()} == before


def test_going_on_with_training_forgets_what_was_kept_for_evaluation() -> None:
    model = build("hgrn_bit", seed=1, vocab_size=61, hidden_size=32, num_layers=2)
    cached = [part for part in model.modules() if hasattr(part, "clear_weight_cache")]
    with evaluating(model) as was_training, torch.no_grad():
        model.generate(PROMPT, 2)
        assert was_training and any(part._weight_cache is not None for part in cached)
    assert model.training and all(part._weight_cache is None for part in cached)
