"""A bare loop around our model and our ops: what the trainer itself adds is measured against this."""

from __future__ import annotations

from bench import hook
from bench.peers.ours import our_model
from bench.task import arguments, train


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

    def loss_of(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with precision.autocast(chosen, model.device):
            hidden = model.hidden(Batch.from_ids(inputs, labels=labels)).hidden
            return linear_cross_entropy(hidden, model.head.weight, labels) / task.tokens_per_step

    hook.describe(given.log, losses=train(task, model, optimizer, loss_of))


if __name__ == "__main__":
    main()
