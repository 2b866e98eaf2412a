"""Changes nothing: when memory runs out, what it was used for, and the flags that need less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from treadle.errors import OutOfMemory
from treadle.models.base import Model
from treadle.ops.memory import is_out_of_memory, machine_bytes, peak_resident_bytes
from treadle.training.config import Recipe
from treadle.training.optim import Optimizers
from treadle.training.resolve import Schedule


@contextmanager
def on_out_of_memory(model: Model, optimizers: Optimizers, recipe: Recipe, plan: Schedule) -> Iterator[None]:
    """Turns a failed allocation into OutOfMemory with what used the memory and settings to paste."""
    try:
        yield
    except Exception as problem:
        if not is_out_of_memory(problem):
            raise
        raise OutOfMemory(
            f"out of memory: {used_by_kind(model, optimizers)}. A step needs less with {' or '.join(smaller(recipe, plan))}"
        ) from problem


def used_by_kind(model: Model, optimizers: Optimizers) -> str:
    """Weights, gradients and optimiser state as they are, and what is left of the peak for activations."""
    weights = sum(p.nbytes for p in model.parameters())
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer = sum(t.nbytes for t in optimizers.state_tensors().values())
    device = model.device
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    else:
        peak, total = peak_resident_bytes(), machine_bytes()
    rest = max(0, peak - weights - gradients - optimizer)
    kinds = {"weights": weights, "gradients": gradients, "optimiser": optimizer, "activations and the rest": rest}
    shown = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in kinds.items())
    return f"at most {peak / 1e9:.2f} of {total / 1e9:.2f} GB were in use ({shown})"


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
