"""Batches made ahead by worker processes (torch's DataLoader over step numbers, so there is no state to save)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from treadle.processes import begin_data_worker


class _Steps(TorchDataset[Any]):
    def __init__(self, read: Callable[[int], Any]) -> None:
        self.read = read

    def __getitem__(self, step: int) -> Any:
        return self.read(step)


def in_workers(read: Callable[[int], Any], steps: Iterable[int], workers: int, prefetch: int) -> Iterator[Any]:
    """read(step) for each step, in order, by `workers` processes that are each `prefetch` steps ahead at most."""
    loader = DataLoader(
        _Steps(read), batch_size=None, sampler=steps, num_workers=workers, prefetch_factor=prefetch,
        pin_memory=False, multiprocessing_context="fork", worker_init_fn=lambda number: begin_data_worker(),
        generator=torch.Generator(),  # workers draw their base seed from here, not from the model's generator
    )  # fmt: skip
    return iter(loader)
