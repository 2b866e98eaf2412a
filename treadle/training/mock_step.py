"""Changes nothing: one step without an update, so that too little memory and what does not compile show before the first real one."""

from __future__ import annotations

from treadle.data.base import BatchPlan, Dataset
from treadle.errors import ConfigError, DataError, TreadleError
from treadle.ops.memory import is_out_of_memory
from treadle.training.assembly import Assembly
from treadle.training.config import Recipe


def mock_step(dataset: Dataset, plan: BatchPlan, assembly: Assembly, recipe: Recipe) -> None:
    """On the first batch. ConfigError where torch.compile does not work, DataError for data without a batch. Without a GPU and without
    torch.compile nothing is computed: the system ends a process that needs too much memory without an error to catch, and whatever
    else may be wrong the first step finds too, .12 seconds sooner in the demo."""
    first = next(iter(dataset.batches(dataset.start, plan.alone())), None)
    if first is None:
        raise DataError("the data holds no batch to train on")
    if assembly.stepper.device.type == "cpu" and not recipe.train.torch_compile:
        return
    try:
        assembly.stepper.run(0, first[0], 0.0, update=False)
    except Exception as problem:
        if not recipe.train.torch_compile or isinstance(problem, TreadleError) or is_out_of_memory(problem):
            raise
        raise ConfigError(f"torch.compile does not work here ({type(problem).__name__}: {str(problem)[:200]}); leave out "
                          "--torch_compile") from problem  # fmt: skip
    if not assembly.strategy.engine_owns_step:
        assembly.optimizers.zero_grad()
