"""Changes the checkpoint folder when it saves, and weights, optimiser and counters when it restores: a run's whole state as
a checkpoint, and back.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from treadle.checkpoint import retention, writer
from treadle.checkpoint.copies import place_of
from treadle.checkpoint.fetching import take_up
from treadle.checkpoint.layout import steps_in
from treadle.checkpoint.mirror import Mirror
from treadle.checkpoint.reader import Checkpoint, newest_valid
from treadle.data.base import Dataset
from treadle.distributed.world import World
from treadle.errors import Diverged, PeerFailed, SaveError
from treadle.monitor import records
from treadle.ops.sharding import host_copy
from treadle.text.base import Tokenizer
from treadle.training.assembly import Assembly
from treadle.training.context import Context
from treadle.training.run_state import RunState
from treadle.training.saving import Saved, Saver
from treadle.training.step import LossScale

SAVE_ATTEMPTS = 3
LAST_ROLLBACK = 3  # the third one ends the run

Tensors = dict[str, dict[str, Tensor]]
Contents = tuple[Tensors, dict[str, bytes], dict[str, Any]]


class Checkpoints:
    """The checkpoints of one run: written, marked, rotated, found and taken up again."""

    def __init__(self, context: Context, assembly: Assembly) -> None:
        self.assembly, self.world, self.folder = assembly, context.world, context.checkpoint_folder
        self.tokenizer, self.keep = context.dataset.tokenizer, context.config.checkpoint.save_total_limit
        self.emit, self.warn, self.say = context.emit, context.warn, context.console.say
        self.saver = Saver(context.config.checkpoint.asynchronous)
        self.saved_step = -1  # of the last save, which may still be in flight
        self.failures = 0  # saves in a row that failed
        context.remark = self.remark
        self.mirror, self.mirrored = self._mirror(context), context.config.checkpoint.mirror is not None
        context.began = self.began

    def _mirror(self, context: Context) -> Mirror | None:
        """Of the first process alone, which sees all files."""
        url = context.config.checkpoint.mirror
        if url is None or not self.world.is_main_process:
            return None
        return Mirror(place_of(url, context.folder), context.folder, self.folder, context.log_folder, self.keep, self.warn, self.emit)

    # ---- saving ----

    def _contents(self, context: Context) -> Contents:
        state, config, scale = context.state, context.config.to_toml(), self.assembly.stepper.loss_scale
        state.callbacks = context.states()
        if scale is not None:
            state.loss_scale = asdict(scale)
        files = {
            "run_state.json": json.dumps({**state.to_json(), "position": self._position(context)}, indent=1, allow_nan=False).encode(),
            "config.toml": config.encode(),
            **{f"tokenizer/{name}": data for name, data in _tokenizer_files(self.tokenizer).items()},
        }
        described = {
            "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
            "data_fingerprint": state.data_fingerprint,
            "versions": records.versions(),
        }
        weights, moments = self.assembly.strategy.gather_full_state(
            self.assembly.optimizers.named_weights(self.assembly.model), self.assembly.optimizers.state_tensors()
        )
        return {"model": weights, "optimizer": moments}, files, described

    def _position(self, context: Context) -> Any:
        """Where the data goes on for all processes: each may know only its own share of it."""
        position, data = context.state.position, context.dataset
        if self.world.size == 1 or type(data).join is Dataset.join:
            return position
        return data.join(self.world.all_gather_object(position))

    def save(self, context: Context, best: Mapping[str, float] | None) -> None:
        """Starts the save of the current step, once the one before is collected; `best`: marks it as the best, by these
        metrics."""
        self.saved_step = context.step
        self.saver.submit(Saved(context.step, best is not None), self._prepare(context, best))

    def _prepare(self, context: Context, best: Mapping[str, float] | None) -> Callable[[], None]:
        """The save as a function: writes, marks, rotates. For a save in the background the state is copied now, since the
        next step changes it."""
        step, world, strategy = context.step, self.world, self.assembly.strategy
        tensors, files, described = self._contents(context)
        if self.saver.asynchronous:
            world = world.background()
            if strategy.shards_optimizer or world.is_main_process:
                mesh = strategy.host_mesh
                tensors = {stem: {n: host_copy(t, mesh) for n, t in group.items()} for stem, group in tensors.items()}

        def after() -> None:
            if best is not None:
                retention.mark_best(self.folder, step, dict(best))
            retention.rotate(self.folder, self.keep, self.mirror.in_use if self.mirror is not None else ())

        def job() -> None:
            self._write(self.folder, step, (tensors, files, described), world)
            world.on_main_first(after)

        return job

    def _write(self, root: Path, step: int, contents: Contents, world: World, name: str | None = None) -> str:
        """By the first process alone where it holds everything, else by all together."""
        if not self.assembly.strategy.shards_optimizer:
            return world.on_main_first(lambda: writer.save(root, step, *contents, name=name))
        from treadle.checkpoint import sharded

        return sharded.save(root, step, *contents, peers=world, name=name)

    def collect(self, must: bool = False) -> Saved | None:
        """Waits for the save in flight and returns it when it is on disk. Twice in a row a save may fail."""
        saved = self.saver.wait()
        if self.mirror is not None:
            self.mirror.tell()
        if saved is None:
            return None
        if saved.problem is None:
            self.failures = 0
            self.emit("saved", step=saved.step, best=saved.best)
            if self.mirror is not None:
                self.mirror.offer(saved.step)
            return saved
        if not isinstance(saved.problem, (SaveError, PeerFailed)):
            raise saved.problem
        self.saved_step = -1
        self.failures += 1
        self.emit("save_failed", step=saved.step, reason=str(saved.problem))
        if must or self.failures >= SAVE_ATTEMPTS:
            raise saved.problem
        self.warn(f"{saved.problem} (attempt {self.failures} of {SAVE_ATTEMPTS}; training goes on)")
        return None

    def save_to(self, path: Path, context: Context) -> str:
        """Writes a checkpoint to a folder of its own, outside rotation."""
        return self._write(path.parent, context.step, self._contents(context), self.world, path.name)

    def remark(self, step: int, metrics: Mapping[str, float]) -> None:
        """Marks a step that is on disk as the best, where another one is marked."""

        def mend() -> None:
            if retention.best_step(self.folder) != step and step in steps_in(self.folder):
                retention.mark_best(self.folder, step, dict(metrics))

        self.world.on_main_first(mend)

    def began(self) -> None:
        """Before the first step of this start, in the first process: the mirror is this run's, and gets what it may have missed."""
        if self.mirror is not None:
            steps = steps_in(self.folder)
            self.mirror.begin(must=not steps)
            if steps:
                self.mirror.offer(steps[0])

    def settle(self) -> None:
        """All processes wait until the last checkpoint is copied: one that left would be the end of the one that copies."""
        if self.mirrored:
            self.world.on_main_slowly(lambda: self.mirror.close(self.say) if self.mirror is not None else None)

    def close(self) -> None:
        """Waits for what is in flight, also to the mirror."""
        self.saver.close()
        if self.mirror is not None:
            self.mirror.close(self.say)

    # ---- taking up ----

    def find_newest(self, copies_too: bool = False) -> Checkpoint | None:
        """The newest checkpoint that verifies; the first process looks, and all open the same one. copies_too: also in the mirror."""
        if copies_too and self.mirrored:
            mirror = self.mirror
            self.world.on_main_slowly(lambda: take_up(mirror.place, mirror.run, self.folder, mirror.logs, self.warn) if mirror is not None else None)

        def look() -> str | None:
            found = newest_valid(self.folder, self.warn)
            return str(found.folder) if found is not None else None

        folder = self.world.on_main_first(look)
        return Checkpoint(folder) if folder is not None else None

    def to_go_back_to(self, state: RunState, reason: str) -> Checkpoint:
        """The newest checkpoint, said aloud; Diverged the third time or without one."""
        found = self.find_newest()
        if found is None or found.step >= state.step or state.rollbacks + 1 >= LAST_ROLLBACK:
            why = "there is no checkpoint to go back to" if found is None else f"it is rollback {state.rollbacks + 1}"
            raise Diverged(f"{reason}; {why}. The weights of the last checkpoint are sound. Try a lower --learning_rate, "
                           "more --warmup_steps, or --precision fp32")  # fmt: skip
        self.go_back()
        self.emit("rolled_back", step=state.step, to=found.step, reason=reason)
        self.warn(f"{reason}; back to step {found.step}, skipping the rows of {state.step - found.step} steps")
        return found

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """The model's weights; where they are in shards each process reads its part alone."""
        strategy, model = self.assembly.strategy, self.assembly.model
        if strategy.engine_owns_step and strategy.load_full_state(checkpoint.tensors("model"), {}):
            return
        if not strategy.shards_weights:
            model.load_weights(checkpoint.tensors("model"))
            return
        from treadle.checkpoint import sharded

        own = model.trained_weights()
        model.refuse_other_weights(sharded.shapes(checkpoint, "model"))
        sharded.load_into(checkpoint, "model", own, self.world.group)

    def restore(self, checkpoint: Checkpoint, threads: int) -> RunState:
        """Weights and optimiser state from a verified checkpoint; returns its counters. threads: of this process."""
        state = RunState.from_json(checkpoint.json("run_state.json"))
        if not (self.assembly.strategy.engine_owns_step and self._hand_over(checkpoint)):
            self.load_weights(checkpoint)
            self._load_optimizer(checkpoint)
        if self.assembly.stepper.loss_scale is not None and state.loss_scale:
            self.assembly.stepper.loss_scale = LossScale(**state.loss_scale)
        if state.threads != threads:
            self.warn(f"this run was trained with {state.threads} threads and goes on with {threads}: results will differ in the "
                      "last bits (OMP_NUM_THREADS sets them)")  # fmt: skip
        state.threads = threads
        return state

    def go_back(self) -> None:
        """What was saved after the checkpoint that is gone on from is given up."""
        if self.mirror is not None:
            self.mirror.gone_back = True

    def _hand_over(self, checkpoint: Checkpoint) -> bool:
        return self.assembly.strategy.load_full_state(checkpoint.tensors("model"), checkpoint.tensors("optimizer"))

    def _load_optimizer(self, checkpoint: Checkpoint) -> None:
        optimizers = self.assembly.optimizers
        if not self.assembly.strategy.shards_optimizer:
            kept = checkpoint.tensors("optimizer")
        else:
            from treadle.checkpoint import sharded

            kept = optimizers.empty_state(sharded.shapes(checkpoint, "optimizer"))
            sharded.load_into(checkpoint, "optimizer", kept, self.world.group)
        if anew := optimizers.load_state_tensors(kept):
            self.warn(f"the checkpoint has another optimiser's state of {len(anew)} tensors ({anew[0]}, ...): they begin anew")


def _tokenizer_files(tokenizer: Tokenizer | None) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory(prefix="treadle-") as folder:
        tokenizer.save(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
