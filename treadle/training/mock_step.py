"""Changes nothing: one step without an update, so that memory and shape errors come before the first real one."""

from __future__ import annotations

from treadle.data.base import BatchPlan, Dataset
from treadle.errors import ConfigError, DataError, TreadleError
from treadle.ops.memory import is_out_of_memory
from treadle.registry import nearest
from treadle.training.assembly import Assembly
from treadle.training.config import Recipe


def mock_step(dataset: Dataset, plan: BatchPlan, assembly: Assembly, recipe: Recipe) -> None:
    """On the first batch. ConfigError for a loss weight of no loss, and where torch.compile does not work. DataError
    for data without a batch."""
    first = next(iter(dataset.batches(dataset.start, plan.alone())), None)
    if first is None:
        raise DataError("the data holds no batch to train on")
    micro_batches, _ = first
    if assembly.stepper.device.type == "cpu" and not recipe.train.torch_compile:
        # The system ends a process that needs too much memory without an error to catch, so the shapes alone are tried: half a
        # second less on one core until the demo's first loss.
        whole, few = micro_batches[0], micro_batches[0].rows(0, 2)
        few.counts = {**whole.counts, **few.counts}  # a data set's own counts are those of all rows: no number here is kept
        micro_batches = [few]
    try:
        result = assembly.stepper.run(0, micro_batches, 0.0, update=False)
    except Exception as problem:
        if not recipe.train.torch_compile or isinstance(problem, TreadleError) or is_out_of_memory(problem):
            raise
        raise ConfigError(f"torch.compile does not work here ({type(problem).__name__}: {str(problem)[:200]}); leave out "
                          "--torch_compile") from problem  # fmt: skip
    unknown = sorted(set(recipe.train.loss_weights) - set(result.losses))
    if unknown:
        raise ConfigError(f"loss_weights.{unknown[0]}: {nearest(unknown[0], list(result.losses))} (the parts of this model's "
                          "loss)")  # fmt: skip
    if not assembly.strategy.engine_owns_step:
        assembly.optimizers.zero_grad()
