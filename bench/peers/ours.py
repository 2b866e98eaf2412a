"""treadle's Trainer, as `treadle train` runs it: logging, metrics files and a checkpoint at the end."""

from __future__ import annotations

import tempfile
from typing import Any

from bench import hook
from bench.task import Task, arguments


def our_model(task: Task) -> Any:
    from treadle.models.base import build

    return build(
        "transformer", style="gpt2", vocab_size=task.vocabulary, hidden_size=task.width, num_layers=task.layers,
        num_heads=task.heads, max_position_embeddings=task.length,
    )  # fmt: skip


def main() -> None:
    given, task = arguments("treadle")
    from treadle.ops.memory import keep_freed_memory

    keep_freed_memory()
    import treadle

    with tempfile.TemporaryDirectory() as folder:
        data = treadle.Dataset.load("austen", tokenizer="byte", seq_len=task.length)
        config = treadle.TrainConfig(
            output_dir=folder, max_steps=task.steps, batch_size=task.rows // task.accumulation,
            gradient_accumulation_steps=task.accumulation, learning_rate=task.learning_rate,
            lr_scheduler_type="constant", weight_decay=task.weight_decay, precision=given.precision, warmup_steps=0,
            logging_steps=1, eval_steps=10_000, sample_tokens=0, save_steps=10_000,
        )  # fmt: skip
        losses: list[float] = []

        class Keep(treadle.Callback):
            def on_log(self, context: Any) -> None:
                losses.append(context.row["loss"])

        trainer = treadle.Trainer(our_model(task), data, config=config, callbacks=[Keep()])
        hook.watch(given.log, name="ours", parameters=trainer.model.parameter_count(), precision=trainer.precision,
                   tokens_per_step=task.tokens_per_step)  # fmt: skip
        trainer.train()
    hook.describe(given.log, losses=losses)


if __name__ == "__main__":
    main()
