"""A trainer's whole state as a checkpoint, and back."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from treadle.checkpoint import retention, writer
from treadle.checkpoint.layout import steps_in
from treadle.checkpoint.reader import Checkpoint
from treadle.monitor import records
from treadle.training.run_state import RunState
from treadle.training.step import LossScale

if TYPE_CHECKING:
    from treadle.training.trainer import Trainer


def _contents(trainer: Trainer) -> tuple[dict[str, dict[str, Tensor]], dict[str, bytes], dict[str, Any]]:
    state = trainer.state
    state.window = trainer.window.to_json()
    state.health = trainer.health.to_json()
    if trainer.stepper.loss_scale is not None:
        state.loss_scale = asdict(trainer.stepper.loss_scale)
    config = trainer.recipe.to_toml()
    files = {
        "run_state.json": json.dumps(state.to_json(), indent=1, allow_nan=False).encode(),
        "config.toml": config.encode(),
        **{f"tokenizer/{name}": data for name, data in _tokenizer_files(trainer).items()},
    }
    described = {
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "data_fingerprint": state.data_fingerprint,
        "versions": records.versions(),
    }
    tensors = {"model": trainer.model.named_weights(), "optimizer": trainer.optimizers.state_tensors()}
    return tensors, files, described


def _tokenizer_files(trainer: Trainer) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="treadle-") as folder:
        trainer.tokenizer.save(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def save(trainer: Trainer, best: bool) -> None:
    """Writes the checkpoint of the current step, marks it best if it is, and rotates old ones."""
    step = trainer.state.step
    writer.save(trainer.checkpoints, step, *_contents(trainer))
    if best:
        _mark_best(trainer)
    retention.rotate(trainer.checkpoints, trainer.recipe.checkpoint.save_total_limit)
    records.write_event(trainer.folder, "saved", step=step, best=best)


def _mark_best(trainer: Trainer) -> None:
    assert trainer.state.best_step is not None
    metric = trainer.recipe.checkpoint.metric_for_best_model
    retention.mark_best(trainer.checkpoints, trainer.state.best_step, {metric: trainer.state.best_metric})


def save_to(trainer: Trainer, path: Path) -> str:
    """Writes a checkpoint to a place of its own, outside rotation."""
    return writer.save(path.parent, trainer.state.step, *_contents(trainer), name=path.name)


def restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Weights, optimiser state and counters from a verified checkpoint."""
    state = RunState.from_json(checkpoint.json("run_state.json"))
    trainer.model.load_weights(checkpoint.tensors("model"))
    trainer.optimizers.load_state_tensors(checkpoint.tensors("optimizer"))
    if trainer.stepper.loss_scale is not None and state.loss_scale:
        trainer.stepper.loss_scale = LossScale(**state.loss_scale)
    if state.threads != trainer.state.threads:
        trainer.console.warn(f"this run was trained with {state.threads} threads and goes on with {trainer.state.threads}: "
                             "results will differ in the last bits (OMP_NUM_THREADS sets them)")  # fmt: skip
    state.threads = trainer.state.threads
    trainer.state = state
    trainer.restored()
    # A kill between a save and its mark, or a return to an older step, leaves a mark that is not this state's.
    marked = retention.best_step(trainer.checkpoints)
    if state.best_step != marked and state.best_step in steps_in(trainer.checkpoints):
        _mark_best(trainer)
