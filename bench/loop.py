"""What the callback loop costs over a bare loop of the same steps: python -m bench.loop

Both run in one process on the same model, batches and optimiser, in turns (bare, trained, bare, trained, ...), and are
compared by CPU seconds, since other programs share the machine. The bare loop calls the step and nothing else; the trained
one has every default callback, a log row every ten steps, no evaluation and no checkpoint but the last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from typing import Any

import treadle
from treadle.data.base import BatchPlan


def make(folder: str, steps: int, rows: int, length: int, width: int) -> Any:
    data = treadle.Dataset.load("austen", tokenizer="byte", seq_len=length)
    model = treadle.build("transformer", vocab_size=data.tokenizer.vocab_size, hidden_size=width, num_layers=4, num_heads=4)
    config = treadle.TrainConfig(output_dir=folder, max_steps=steps, batch_size=rows, precision="fp32", logging_steps=10,
                                 report_to=["jsonl", "csv"], save_steps=steps + 1, num_workers=0)  # fmt: skip
    return treadle.Trainer(model, data, None, config)


def bare(steps: int, *shape: int) -> float:
    """CPU seconds of the steps alone; batches are made ahead in both."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(folder, steps, *shape)
        plan = BatchPlan(0, trainer.plan.global_batch, steps=steps + 1)
        batches = [micro for micro, _ in trainer.dataset.batches(0, plan)]
        trainer.assembly.stepper.run(0, batches[0], 0.0, update=False)
        begun = time.process_time()
        for step in range(steps):
            trainer.assembly.stepper.run(step, batches[step], 1e-3)
        return time.process_time() - begun


def trained(steps: int, *shape: int) -> tuple[float, float]:
    """CPU seconds of a whole training from its first step to its last, and of that inside the step."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(folder, steps, *shape)
        inside = [0.0]
        run, begin = trainer.assembly.stepper.run, [0.0]

        def timed(*arguments: Any, **names: Any) -> Any:
            begun = time.process_time()
            found = run(*arguments, **names)
            inside[0] += time.process_time() - begun
            return found

        trainer.assembly.stepper.run = timed

        class Begin(treadle.Callback):
            def before_step(self, context: Any) -> None:
                if context.step == 0:
                    inside[0], begin[0] = 0.0, time.process_time()

            def on_log(self, context: Any) -> None:
                if context.step == steps:  # before the last checkpoint
                    begin.append(time.process_time() - begin[0])

        trainer.callbacks = type(trainer.callbacks)([*trainer.callbacks, Begin()], trainer.context)
        trainer.train()
        return begin[1], inside[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", type=int, nargs=3, default=[8, 128, 128], help="rows, tokens in a row, width")
    given = parser.parse_args()
    ratios, outside = [], []
    for _ in range(given.rounds):
        alone = bare(given.steps, *given.shape)
        whole, inside = trained(given.steps, *given.shape)
        ratios.append(whole / alone)
        outside.append((whole - inside) / given.steps * 1e3)
    print(json.dumps({"steps": given.steps, "shape": given.shape, "trained_over_bare": statistics.median(ratios), "all": ratios,
                      "milliseconds_outside_the_step": statistics.median(outside)}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
