"""What a training step keeps for its backward pass, by shape and dtype: where the activations' memory goes.

    python -m bench.saved_tensors [--precision fp32]

Storages are counted once, parameters not at all; of the model of `bench.task` (10.8M parameters, 16 x 256 tokens).
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch

from bench.peers.ours import our_model
from bench.task import Task


def saved(precision: str, task: Task) -> tuple[Counter[str], float]:
    """(MB by 'dtype shape', MB in all)."""
    from treadle.data.batch import Batch
    from treadle.objectives.base import ModelWithObjective
    from treadle.objectives.next_token import NextToken
    from treadle.ops.precision import autocast

    model = our_model(task)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: Counter[str] = Counter()
    alive: list[Any] = []  # a storage that is freed could have its address taken by another

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            alive.append(storage)
            found[f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))}"] += storage.nbytes()
        return tensor

    rows = torch.from_numpy(task.batch(task.data(), 0))
    batch = Batch.from_ids(rows[:, :-1].contiguous(), labels=rows[:, 1:].contiguous())
    module = ModelWithObjective(model, NextToken())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(precision, model.device):
        module(batch)
    return Counter({name: size / 1e6 for name, size in found.items()}), sum(found.values()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.saved_tensors", description=__doc__)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    by_shape, total = saved(parser.parse_args().precision, Task())
    for name, size in by_shape.most_common(20):
        print(f"{size:8.1f} MB  {name}")
    print(f"{total:8.1f} MB in all")


if __name__ == "__main__":
    main()
