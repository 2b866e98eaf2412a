"""What one architecture costs beside the first of its suite, in a process of its own: python -m treadle.suite.measure REQUEST RESULT.

A step is forward, backward and AdamW on random tokens; the two models take turns of some steps (A B A B), each round gives a ratio, and
the median of the ratios counts, so that what else the machine does meets both. Times are CPU seconds. Decoding is one more token of
one row after so many. Measured on the CPU, where suites of small models run.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from treadle import trusted_code
from treadle.data.batch import Batch
from treadle.models.base import Model
from treadle.models.catalogue import MODELS
from treadle.monitor.records import write_json
from treadle.objectives.next_token import NextToken
from treadle.ops.memory import keep_freed_memory
from treadle.ops.precision import autocast, resolve

CONTEXTS = {"1k": 1024, "8k": 8192}
ROUNDS, STEPS, DECODED = 5, 3, 24  # turns, and steps of each; tokens that decoding is timed with
SPARE = 64  # positions behind a context


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """request: reference and own (each {"arch", "keys"}), rows, seq_len, precision. -> step_cpu_seconds, step_time_ratio,
    tokens_per_second, and decoding per context: decode_1k (tokens/s), state_1k (bytes), ..."""
    ways = [_stepper(request[name], request) for name in ("reference", "own")]
    ratios, own = [], []
    for number in range(ROUNDS + 1):
        taken = []
        for _, step in ways:
            begun = time.process_time()
            for _ in range(STEPS):
                step()
            taken.append((time.process_time() - begun) / STEPS)
        if number:  # the first warms up
            ratios.append(taken[1] / taken[0])
            own.append(taken[1])
    seconds = statistics.median(own)
    found: dict[str, Any] = {"step_cpu_seconds": seconds, "step_time_ratio": statistics.median(ratios), "step_time_ratios": ratios,
                             "tokens_per_second": request["rows"] * request["seq_len"] / seconds}  # fmt: skip
    model = ways[1][0].eval()
    if model.capabilities.decodes:
        for label, context in CONTEXTS.items():
            found[f"decode_{label}"] = decoding(model, context)
            found[f"state_{label}"] = model.state_bytes(1, context)
    return found


def _stepper(described: dict[str, Any], request: dict[str, Any]) -> tuple[Model, Callable[[], None]]:
    cls = MODELS.get(described["arch"])
    torch.manual_seed(0)
    model = cls(cls.Config.with_preset(None, **described["keys"])).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(0)
    batch = Batch.for_training(torch.randint(0, model.vocab_size, (request["rows"], request["seq_len"]), generator=generator))
    if hasattr(model.config, "source_length"):
        source = torch.zeros(request["rows"], model.config.source_length, dtype=torch.int64)
        batch = replace(batch, extras={**batch.extras, "source": source})
    precision, objective = resolve(request["precision"], torch.device("cpu"), model.width), NextToken()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(precision, torch.device("cpu")):
            loss = torch.stack([one.total for one in objective(model, batch).losses.values()]).sum()
        loss.backward()
        optimizer.step()

    return model, step


def decoding(model: Model, context: int) -> float:
    """Tokens a CPU second of one row with a state that says `context` tokens were seen."""
    token, taken = Batch.from_ids(torch.zeros(1, 1, dtype=torch.int64)), []
    with torch.inference_mode():
        state = model.new_state(1, context + SPARE)
        state.lengths += context
        state.host_lengths = [context]
        for number in range(DECODED + 2):
            begun = time.process_time()
            model(token, state=state)
            if number > 1:
                taken.append(time.process_time() - begun)
    return 1.0 / statistics.median(taken)


def main() -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    request, result = map(Path, sys.argv[1:])
    begun = time.process_time()
    asked = json.loads(request.read_text(encoding="utf-8"))
    trusted_code.recall(asked)
    found = measure(asked)
    write_json(result, {**found, "cpu_seconds": time.process_time() - begun})


if __name__ == "__main__":
    main()
