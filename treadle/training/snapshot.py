"""A trainer's whole state as a checkpoint, and back."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from treadle.checkpoint import retention, writer
from treadle.checkpoint.layout import steps_in
from treadle.checkpoint.reader import Checkpoint, newest_valid
from treadle.distributed.world import World
from treadle.monitor import records
from treadle.ops.sharding import host_copy
from treadle.training.run_state import RunState
from treadle.training.step import LossScale

if TYPE_CHECKING:
    from treadle.training.trainer import Trainer

Tensors = dict[str, dict[str, Tensor]]


def _contents(trainer: Trainer) -> tuple[Tensors, dict[str, bytes], dict[str, Any]]:
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
    weights, moments = trainer.strategy.gather_full_state(trainer.model.named_weights(), trainer.optimizers.state_tensors())
    tensors = {"model": weights, "optimizer": moments}
    return tensors, files, described


def _tokenizer_files(trainer: Trainer) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="treadle-") as folder:
        trainer.tokenizer.save(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _write(
    trainer: Trainer, root: Path, step: int, contents: tuple[Tensors, dict[str, bytes], dict[str, Any]], world: World,
    name: str | None = None,
) -> str:  # fmt: skip
    """By the first process alone where it holds everything, else by all together."""
    if not trainer.strategy.shards_optimizer:
        return world.on_main_first(lambda: writer.save(root, step, *contents, name=name))
    from treadle.checkpoint import sharded

    return sharded.save(root, step, *contents, peers=world, name=name)


def prepare(trainer: Trainer, best: bool) -> Callable[[], None]:
    """The save of the current step as a function: writes it, marks it best if it is, rotates old ones. For a save in the
    background the state is copied now, since the next step changes it."""
    step, state, world = trainer.state.step, trainer.state, trainer.world
    tensors, files, described = _contents(trainer)
    if trainer.saver.asynchronous:
        world = world.background()
        if trainer.strategy.shards_optimizer or world.is_main_process:
            mesh = trainer.strategy.host_mesh
            tensors = {stem: {n: host_copy(t, mesh) for n, t in group.items()} for stem, group in tensors.items()}
    marked = (state.best_step, state.best_metric) if best else None
    keep = trainer.recipe.checkpoint.save_total_limit

    def after() -> None:
        if marked is not None:
            _mark_best(trainer, *marked)
        retention.rotate(trainer.checkpoints, keep)

    def job() -> None:
        _write(trainer, trainer.checkpoints, step, (tensors, files, described), world)
        world.on_main_first(after)

    return job


def _mark_best(trainer: Trainer, step: int | None, value: float | None) -> None:
    assert step is not None
    retention.mark_best(trainer.checkpoints, step, {trainer.recipe.checkpoint.metric_for_best_model: value})


def save_to(trainer: Trainer, path: Path) -> str:
    """Writes a checkpoint to a place of its own, outside rotation."""
    return _write(trainer, path.parent, trainer.state.step, _contents(trainer), trainer.world, path.name)


def find_newest(trainer: Trainer) -> Checkpoint | None:
    """The run's newest checkpoint that verifies; the first process looks, and all open the same one."""

    def look() -> str | None:
        found = newest_valid(trainer.checkpoints, trainer.console.warn)
        return str(found.folder) if found is not None else None

    folder = trainer.world.on_main_first(look)
    return Checkpoint(folder) if folder is not None else None


def load_weights(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """The model's weights; where they are in shards each process reads its part alone."""
    if trainer.strategy.engine_owns_step and trainer.strategy.load_full_state(checkpoint.tensors("model"), {}):
        return
    if not trainer.strategy.shards_weights:
        trainer.model.load_weights(checkpoint.tensors("model"))
        return
    from treadle.checkpoint import sharded

    own = trainer.model.named_weights()
    trainer.model.refuse_other_weights(sharded.shapes(checkpoint, "model"))
    sharded.load_into(checkpoint, "model", own, trainer.world.group)


def _load_optimizer(trainer: Trainer, checkpoint: Checkpoint) -> None:
    if not trainer.strategy.shards_optimizer:
        trainer.optimizers.load_state_tensors(checkpoint.tensors("optimizer"))
        return
    from treadle.checkpoint import sharded

    targets = trainer.optimizers.empty_state(sharded.shapes(checkpoint, "optimizer"))
    sharded.load_into(checkpoint, "optimizer", targets, trainer.world.group)
    trainer.optimizers.load_state_tensors(targets)


def _hand_over(trainer: Trainer, checkpoint: Checkpoint) -> bool:
    return trainer.strategy.load_full_state(checkpoint.tensors("model"), checkpoint.tensors("optimizer"))


def restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Weights, optimiser state and counters from a verified checkpoint."""
    state = RunState.from_json(checkpoint.json("run_state.json"))
    if not (trainer.strategy.engine_owns_step and _hand_over(trainer, checkpoint)):
        load_weights(trainer, checkpoint)
        _load_optimizer(trainer, checkpoint)
    if trainer.stepper.loss_scale is not None and state.loss_scale:
        trainer.stepper.loss_scale = LossScale(**state.loss_scale)
    if state.threads != trainer.state.threads:
        trainer.console.warn(f"this run was trained with {state.threads} threads and goes on with {trainer.state.threads}: "
                             "results will differ in the last bits (OMP_NUM_THREADS sets them)")  # fmt: skip
    state.threads = trainer.state.threads
    trainer.state = state
    trainer.restored()
    trainer.world.on_main_first(lambda: _mend_mark(trainer))


def _mend_mark(trainer: Trainer) -> None:
    """A kill between a save and its mark, or a return to an older step, leaves a mark that is not this state's."""
    state = trainer.state
    marked = retention.best_step(trainer.checkpoints)
    if state.best_step != marked and state.best_step in steps_in(trainer.checkpoints):
        _mark_best(trainer, state.best_step, state.best_metric)
