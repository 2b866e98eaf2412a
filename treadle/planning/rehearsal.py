"""One step of the first of many processes, without the others: fake tensors, and a process group that sends nothing.

Everything that training runs is run: sharding, gathering, forward, backward, the optimiser. What cannot work at this
number of processes fails here, and the bytes handed to each collective are counted.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from treadle.data.batch import Batch
from treadle.distributed.fsdp import make_mesh, shard
from treadle.distributed.settings import ParallelSettings
from treadle.errors import ConfigError
from treadle.models.adapters import made
from treadle.models.base import Model, ModelConfig
from treadle.models.settings import AdapterSettings
from treadle.objectives.base import ModelWithObjective, Objective
from treadle.ops.planned import planned_for
from treadle.ops.precision import autocast
from treadle.planning.step_trace import Shape
from treadle.training import resolve
from treadle.training.optim import Optimizers
from treadle.training.settings import OptimSettings

COLLECTIVES = {"_allgather_base_": "gather", "_reduce_scatter_base_": "scatter", "allreduce_": "reduce"}


@contextlib.contextmanager
def _pretended(world: int) -> Iterator[None]:
    if dist.is_initialized():
        raise ConfigError("a rehearsal needs a process without a process group; run treadle plan on its own")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Counted(TorchDispatchMode):
    """Counts the bytes of the whole tensors that collectives gather, scatter or reduce, where they reach torch's core."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        name = str(operation).removeprefix("c10d.").partition(".")[0]
        if str(operation).startswith("c10d.") and name in COLLECTIVES:
            tensors = [t for t in pytree.tree_leaves(arguments) if isinstance(t, torch.Tensor)]
            self.bytes[COLLECTIVES[name]] += max(t.nbytes for t in tensors)
        return operation(*arguments, **(named or {}))


def rehearse(
    cls: type[Model], config: ModelConfig, objective: Objective, optim: OptimSettings, settings: ParallelSettings,
    shape: Shape, world: int, batch: Batch, adapter: AdapterSettings | None = None,
) -> dict[str, int]:  # fmt: skip
    """Runs one step under fsdp and returns the bytes gathered, scattered and reduced in it."""
    counted = _Counted()
    with _pretended(world):
        mesh = make_mesh("cpu", world, settings.shard_size)
        with planned_for("cpu"), FakeTensorMode(allow_non_fake_inputs=True):
            model = made(cls, config, adapter)
            resolve.set_checkpointing(model, shape.gradient_checkpointing)
            module = ModelWithObjective(model, objective)
            shard(module, model, mesh, settings, shape.precision)
            optimizers = Optimizers(model, optim)
            with counted:
                for _ in range(shape.accumulation):
                    with autocast(shape.precision, torch.device("cpu")):
                        parts = module(batch)
                    sum(part.total for part in parts.losses.values()).backward()
            optimizers.step()
            optimizers.zero_grad()
    return dict(counted.bytes)
