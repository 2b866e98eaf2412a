"""Contract 7: one process == DDP == FSDP, for every registered architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.several import run_in
from treadle.data.batch import Batch
from treadle.distributed.choose import make_strategy
from treadle.distributed.settings import ParallelSettings
from treadle.distributed.world import World
from treadle.evaluation.evaluator import Evaluator
from treadle.objectives.base import ModelWithObjective
from treadle.objectives.next_token import NextToken
from treadle.text.base import Tokenizer
from treadle.training.optim import Optimizers
from treadle.training.settings import OptimSettings
from treadle.training.step import Stepper

from .conftest import every_model_but_pure_mixers, first_shapes_are_usual, make, random_ids

ROWS, LENGTH, STEPS = 4, 16, 4
MODES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, optimiser in shards": {"mode": "ddp", "shard_optimizer": True},
    "fsdp": {},
    "fsdp, recomputing": {"mode": "fsdp", "recompute": True},
}


def batches(step: int, packs: bool) -> list[Batch]:
    """Four rows a step, the second with two documents and padding, so that processes hold unequal counts."""
    ids = random_ids(ROWS, LENGTH, seed=step)
    doc_ids = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    if packs:
        doc_ids[1, 5:] = 1
    doc_ids[1, 11:] = -1
    return [Batch.for_training(ids, doc_ids).rows(i, i + 1) for i in range(ROWS)]


def trace(case: tuple[str, int], optimizer: str, mode: str, rank: int = 0, size: int = 1) -> list[list[float]]:
    """[loss, gradient norm, loss of an evaluation after it, the same by a fresh model of these weights] of each step; two
    micro-batches a step for each of two processes, four for one."""
    model, world = make(*case), World.open()
    options = dict(MODES.get(mode, {}))
    recompute = options.pop("recompute", False)
    settings = ParallelSettings(**{"mode": mode.split(",")[0], **options})
    for block in model.blocks():
        block.gradient_checkpointing = recompute
    unit = ModelWithObjective(model, NextToken())
    chosen = settings.mode if size > 1 else "none"
    strategy = make_strategy(
        chosen, unit, model, world, settings, precision="fp32", accumulation=2, device=torch.device("cpu")
    )
    stepper = Stepper(
        unit, Optimizers(model, OptimSettings(name=optimizer), settings.shard_optimizer and size > 1), seed=0,
        precision="fp32", max_grad_norm=1.0, loss_weights={}, strategy=strategy,
    )  # fmt: skip
    evaluator = Evaluator(model, Tokenizer.load("byte"), strategy=strategy)
    found = []
    for step in range(STEPS):
        share = ROWS // size
        result = stepper.run(step, batches(step, model.capabilities.packs)[rank * share : (rank + 1) * share], 1e-2)
        model.eval()
        batch = batches(STEPS, model.capabilities.packs)[1]
        nats = evaluator.batch_sums(batch)["nats"]
        model.train()
        fresh = make(*case).eval()
        fresh.load_weights({n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in model.named_weights().items()})
        found.append([result.loss, result.grad_norm, nats, Evaluator(fresh, Tokenizer.load("byte")).batch_sums(batch)["nats"]])
    return found


def traces(case: tuple[str, int], optimizer: str, modes: list[str]) -> dict[str, list[list[float]]]:
    world = World.open()
    return {mode: trace(case, optimizer, mode, world.rank, world.size) for mode in modes}


def agree(
    case: tuple[str, int], modes: dict[str, list[list[float]]], alone: list[list[float]], usual: float, updated: float
) -> None:
    """Of a model that rounds its weights, what follows the first update may differ where a last bit moved a rounding:
    `updated` bounds the evaluation right after it."""
    rounds = make(*case).capabilities.rounds
    for mode, found in modes.items():
        for step, (got, want) in enumerate(zip(found, alone)):
            bounds = [usual] * 3 if not rounds else [1e-1] * 3 if step > 0 else [usual, usual, updated]
            for mine, other, bound in zip(got[:3], want, bounds):
                assert mine == pytest.approx(other, rel=bound), (mode, step)
            assert got[2] == pytest.approx(got[3], rel=1e-5), (mode, step)


@every_model_but_pure_mixers
def test_07_one_process_is_ddp_is_fsdp(case: tuple[str, int]) -> None:
    alone = trace(case, "adamw", "none")
    for modes in run_in(2, traces, case, "adamw", list(MODES)):
        agree(case, modes, alone, 1e-5, 1e-5)


@first_shapes_are_usual
def test_07_with_muon(case: tuple[str, int]) -> None:
    alone = trace(case, "muon", "none")
    for modes in run_in(2, traces, case, "muon", ["ddp", "fsdp"]):
        agree(case, modes, alone, 1e-3, 1e-2)
