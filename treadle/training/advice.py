"""When memory runs out: what it was planned for, and the flags that need less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from treadle.errors import OutOfMemory
from treadle.ops.memory import machine_bytes, peak_resident_bytes
from treadle.training.config import Recipe
from treadle.training.resolve import Schedule


def is_out_of_memory(problem: BaseException) -> bool:
    if isinstance(problem, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(problem).lower()
    return isinstance(problem, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


@contextmanager
def on_out_of_memory(recipe: Recipe, plan: Schedule) -> Iterator[None]:
    """Turns a failed allocation into OutOfMemory with settings to paste."""
    try:
        yield
    except Exception as problem:
        if not is_out_of_memory(problem):
            raise
        raise OutOfMemory(
            f"out of memory: at most {peak_resident_bytes() / 1e9:.2f} GB were in use of {machine_bytes() / 1e9:.2f} GB; "
            f"a step needs less with {' or '.join(smaller(recipe, plan))}"
        ) from problem


def smaller(recipe: Recipe, plan: Schedule) -> list[str]:
    """Flags that keep the result and need less memory, then ones that change it."""
    flags = []
    if plan.micro_batch > 1:
        half = plan.micro_batch // 2
        flags.append(f"`--per_device_train_batch_size {half} --gradient_accumulation_steps {plan.global_batch // half}`"
                     if plan.global_batch % half == 0 else "`--per_device_train_batch_size 1`")  # fmt: skip
    if recipe.train.gradient_checkpointing is False:
        flags.append("`--gradient_checkpointing true`")
    if recipe.data.seq_len > 64:
        flags.append(f"`--seq_len {recipe.data.seq_len // 2}`")
    return flags
