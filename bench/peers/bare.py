"""A bare loop around our model and our ops: what the trainer itself adds is measured against this."""

from __future__ import annotations

from bench import hook
from bench.peers.ours import our_model
from bench.task import arguments


def main() -> None:
    given, task = arguments("bare loop around our model")
    from treadle.ops.memory import keep_freed_memory

    keep_freed_memory()
    import torch

    from treadle.data.batch import Batch
    from treadle.ops import precision
    from treadle.ops.cross_entropy import linear_cross_entropy
    from treadle.training.optim import Optimizers
    from treadle.training.settings import OptimSettings

    model = our_model(task)
    chosen = precision.resolve(given.precision, model.device, task.width)
    (optimizer,) = Optimizers(model, OptimSettings(learning_rate=task.learning_rate)).inner
    hook.watch(given.log, name="bare", parameters=model.parameter_count(), precision=chosen,
               tokens_per_step=task.tokens_per_step)  # fmt: skip
    data, losses = task.data(), []
    for step in range(task.steps):
        rows = torch.from_numpy(task.batch(data, step))
        batch = Batch.from_ids(rows[:, :-1].contiguous(), labels=rows[:, 1:].contiguous())
        with precision.autocast(chosen, model.device):
            hidden = model.hidden(batch).hidden
            loss = linear_cross_entropy(hidden, model.head.weight, batch.labels) / task.tokens_per_step
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    hook.describe(given.log, losses=losses)


if __name__ == "__main__":
    main()
