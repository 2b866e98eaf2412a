"""From what a user typed to a trained run: compose, compare with what the folder holds, prepare, build, train."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle import trusted_code
from treadle.checkpoint.lock import LOCK_FILE, RunLock
from treadle.errors import ConfigError, InputError, PeerFailed, PeerLost, Stopped
from treadle.monitor.console import Console
from treadle.naming import TYPED
from treadle.recipe import Layer, compose, settled_folder, settled_section, typed_layers
from treadle.settings import load_table
from treadle.text.base import Tokenizer
from treadle.training.config import Recipe

if TYPE_CHECKING:
    from treadle.checkpoint.reader import Checkpoint
    from treadle.data.base import Dataset
    from treadle.distributed.world import World
    from treadle.models.base import Model
    from treadle.objectives.base import Objective
    from treadle.training.trainer import Trainer

CONFIG = "config.toml"
LOGS = ("metrics.jsonl", "training_log.csv", "eval_log.csv")


@dataclass
class Request:
    """What a user asked for."""

    target: str | Mapping[str, Any] | None = None  # what `train` takes; from Python also a recipe's table
    flags: dict[str, Any] | None = None
    fresh: bool = False
    weights_from: str | None = None
    allow_change: Sequence[str] = ()
    flags_are_text: bool = True
    base: tuple[Layer, ...] = ()  # below what was typed; with one, no target is no default recipe either
    above: tuple[Layer, ...] = ()  # above it
    trust_code: Sequence[str] = ()  # FILE.py or MODULE that names in files may refer to
    other_flags: tuple[str, ...] = ("fresh", "from", "allow-change", "trust-code", "help")  # what the verb takes beside keys

    def __post_init__(self) -> None:
        trusted_code.allow(self.trust_code)
        trusted_code.allow_names(self.flags)  # typed, or passed from Python

    @functools.cached_property
    def start_weights(self) -> Checkpoint | None:
        """The checkpoint of --from, found and verified once."""
        from treadle.models.pretrained import locate

        return locate(self.weights_from) if self.weights_from is not None else None

    def named_layers(self) -> list[Layer]:
        """What was typed: the target and the flags."""
        return [*typed_layers(self.target, self._flag_layer(), not self.base), *self.above]

    def _flag_layer(self) -> Layer:
        if not self.flags_are_text:
            return Layer(dict(self.flags or {}), TYPED[1], other_flags=self.other_flags)
        return Layer(dict(self.flags or {}), TYPED[0], from_text=True, other_flags=self.other_flags)

    def layers(self) -> list[Layer]:
        """The same above the model of --from."""
        if self.start_weights is None:
            return [*self.base, *self.named_layers()]
        from treadle.models.pretrained import read_config

        model = read_config(self.start_weights).get("model", {})
        start = Layer({"model": model}, f"the model of {self.weights_from}", trained=True)
        return [*self.base, start, *self.named_layers()]


def configure(request: Request, folder: Path) -> Recipe:
    """The recipe to run in `folder`: what the folder's run was started with, changed only where that is allowed."""
    layers = request.layers()
    if request.fresh or not has_begun(folder):
        recipe = compose(layers)
    else:
        stored = Layer(load_table(folder / CONFIG), "the run", weak=True)
        trusted_code.recall(stored.table)
        recipe = compose([stored, *layers])
        _refuse_changes(compose([stored]), recipe, request.allow_change)
    named, placed = (recipe.origins.get(f"run.{key}", "").partition(": ")[0] for key in ("run_name", "output_dir"))
    if named in TYPED and placed not in ("", *TYPED) and recipe.run.run_name != folder.name:
        recipe.notes.append(f"run_name = {recipe.run.run_name} is what trackers and messages call the run; its folder is {folder}, as {placed} says "
                            "(another one: --output_dir)")  # fmt: skip
    recipe.run.output_dir = str(folder)
    recipe.run.run_name = recipe.run.run_name or folder.name
    return recipe


def has_begun(folder: Path) -> bool:
    """There is a checkpoint to go on from. Before the first one nothing binds: a start that failed (too little memory, say)
    may be tried again with any other settings."""
    from treadle.models.pretrained import checkpoint_root

    root = checkpoint_root(folder)
    return (folder / CONFIG).is_file() and root.is_dir() and any("step-" in path.name for path in root.iterdir())


def free_folder(folder: Path) -> Path:
    """`folder`, or folder-2, folder-3, ... : the first that is not used yet."""
    number, candidate = 1, folder
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _allowed(key: str, allow: Sequence[str]) -> bool:
    section, _, leaf = key.partition(".")
    return any(word in (key, section, leaf) for word in allow)


def _refuse_changes(stored: Recipe, wanted: Recipe, allow: Sequence[str]) -> None:
    before, after = stored.tables(), wanted.tables()
    for section, table in after.items():
        for name, value in table.items():
            key, old = f"{section}.{name}", before.get(section, {}).get(name)
            if value == old or value == "auto" or (section == "run" and name != "seed"):
                continue
            rule = wanted.change_rule(key)
            if rule == "guarded" and not _allowed(key, allow):
                raise ConfigError(f"{key} was {old!r} when this run started and is now {value!r} "
                                  f"({wanted.origins.get(key, '')}). Start a new run with --fresh, or go on with the new value: "
                                  f"--allow-change {key}")  # fmt: skip
            if rule == "fixed":
                raise ConfigError(f"{key} was {old!r} when this run started and cannot become {value!r} "
                                  f"({wanted.origins.get(key, '')}); start a new run with --fresh")  # fmt: skip


@contextmanager
def _locked(folder: Path) -> Iterator[RunLock]:
    """The run's lock; a folder that nothing came of is removed again."""
    existed = folder.exists()
    lock = RunLock(folder)
    try:
        yield lock
    finally:
        if not existed and {p.name for p in folder.iterdir()} <= {LOCK_FILE}:
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def load_data(recipe: Recipe, console: Console, tokenizer: Tokenizer | None = None) -> dict[str, Dataset]:
    """The datasets to train and evaluate on; says what is being done when it takes a while."""
    from treadle.data.dataset import TokenDataset, splits_of
    from treadle.objectives.task import task_settings

    def progress(done: int, total: int) -> None:
        if total > 1:
            console.say(f"preparing data: {done}/{total} pieces")

    splits = splits_of(recipe.data, recipe.tokenizer, task_settings(recipe.tables()), recipe.run.seed, tokenizer, progress)
    for name, data in splits.items():
        console.say(f"{name}: {data.describe()}")
        if isinstance(data, TokenDataset) and name == "train" and (count := data.stats()["malformed"]):
            first = "; ".join(p for t in data.sets for p in t.statistics["malformed_first"][:3])
            console.warn(f"{count} malformed document(s) were left out: {first}")
    return splits


def build_model(recipe: Recipe, dataset: Dataset) -> Model:
    """The recipe's model on the meta device (the trainer allocates it, whole or in shards); the recipe then holds every
    resolved key of it."""
    from treadle.models.catalogue import MODELS
    from treadle.ops.quick_start import shapes_only

    cls = MODELS.get(recipe.arch)
    keys = {key: value for key, value in dataset.model_keys().items() if key in cls.Config.model_fields} | recipe.model
    config = cls.Config.with_preset(recipe.preset, **keys)
    recipe.model = config.model_dump()
    with shapes_only():
        return cls(config)


def make_trainer(request: Request, recipe: Recipe, console: Console, world: World | None = None) -> Trainer:
    """Everything up to the first step: data, model, trainer, and the checkpoint to go on from."""
    from treadle.distributed.world import World
    from treadle.models.base import count_label
    from treadle.models.pretrained import keep_generation_file, locate, read_tokenizer, tokenizer_to_start_with
    from treadle.ops.attention import check_backend
    from treadle.ops.memory import keep_freed_memory, return_freed_memory
    from treadle.ops.precision import autocast_dtype
    from treadle.reporting.tables import architecture
    from treadle.training import adapting
    from treadle.training.trainer import Trainer

    return_freed_memory() if recipe.parallel.mode == "fsdp" else keep_freed_memory()
    for note in recipe.notes:
        console.say(f"note: {note}")
    folder, world = recipe.folder, world or World()
    tokenizer = Tokenizer.load(folder / "tokenizer") if has_begun(folder) and (folder / "tokenizer").is_dir() else None
    start_weights = request.start_weights
    if start_weights is not None and tokenizer is None:
        tokenizer = tokenizer_to_start_with(start_weights, recipe.tokenizer.name)
    if recipe.distill.stage is not None and recipe.distill.teacher is not None and tokenizer is None:
        tokenizer = read_tokenizer(locate(recipe.distill.teacher))
    splits = _shared_data(recipe, console, tokenizer, world)
    model = build_model(recipe, splits["train"])
    base = adapting.put_on(model, recipe, start_weights, has_begun(folder))
    objective = _objective(recipe)
    if (begins_with := base or start_weights) is not None or not has_begun(folder):
        objective.starts_from(None if begins_with is None else str(Path(begins_with.folder).resolve()), recipe.run.seed)
    for note in [*objective.notes(model), *adapting.notes(model)]:
        console.say(f"note: {note}")
    teacher = getattr(objective, "teacher", None)
    if teacher is not None and start_weights is None and recipe.distill.carry_weights:
        carried = model.start_from(teacher.named_weights())
        console.say(f"{len(carried)} of {len(model.named_weights())} weights start as the teacher's")
    trainer = Trainer(
        model, splits["train"], splits.get("validation"), recipe, objective, resume=True, console=console,
        listen=not console.quiet, world=world,
    )  # fmt: skip
    computed_by = check_backend(recipe.train.attention_backend, trainer.device, autocast_dtype(trainer.context.precision))
    kinds = architecture(model.arch, getattr(model.config, "layer_types", None))
    attention = f", attention {computed_by}" if kinds == model.arch or "full_attention" in kinds else ""
    first = trainer.plan.length_at(0)
    cut = f" (cut into {first} at first)" if first is not None and first != splits["train"].seq_len else ""
    shared = f", {world.size} processes ({trainer.context.strategy.mode})" if world.size > 1 else ""
    console.say(f"{kinds}: {count_label(trainer.run_folder.parameter_count)} parameters, {trainer.plan.max_steps} steps of "
                f"{trainer.plan.global_batch} rows x {splits['train'].seq_len}{cut}, {trainer.context.precision} on {trainer.device}"
                f"{attention}{shared}")  # fmt: skip
    if base is not None:
        console.say(f"adapters on {base.folder}: {adapting.load_frozen(model, base)}")
    if recipe.checkpoint.resume_from_checkpoint is not None:
        chosen = locate(recipe.checkpoint.resume_from_checkpoint, console.warn)
        world.on_main_first(lambda: _take_up(trainer, chosen))
        checkpoint: Checkpoint | None = chosen
    else:
        checkpoint = trainer.checkpoints.find_newest()
    recipe.checkpoint.resume_from_checkpoint = None  # said once; the stored configuration goes on from the newest
    if checkpoint is not None:
        console.say(f"Loading checkpoint: {checkpoint.folder}")
        trainer.load_checkpoint(checkpoint)
        _check_data(trainer, splits["train"], request.allow_change)
        console.say(f"Resumed from step {trainer.state.step}")
    elif start_weights is not None:
        steps = world.all_gather_object(getattr(start_weights, "step", 0))
        if len(set(steps)) > 1:  # a copy that a training run is still adding to
            raise ConfigError(f"the processes found different checkpoints at {request.weights_from} (steps {steps}); name one: {request.weights_from}@{min(steps)}")
        if base is None:
            adapting.load_start(trainer.checkpoints, start_weights)
        if world.is_main_process:
            keep_generation_file(start_weights, folder)
        console.say(f"Weights from {start_weights.folder}")
    return trainer


def _keep_what_is_needed(trainer: Trainer, console: Console) -> None:
    """What the run is built on is not rotated away by the run that it belongs to."""
    from treadle.checkpoint.retention import keep_for

    base = trainer.recipe.adapter.base_model
    for place in [*([base] if base is not None else []), *trainer.objective.needs()] if trainer.world.is_main_process else []:
        try:
            keep_for(Path(place), trainer.recipe.folder)
        except OSError as problem:  # of somebody else's, or read-only
            console.warn(f"{place} is needed as long as this run is, and nothing could be written beside it that says so ({problem})")


def _objective(recipe: Recipe) -> Objective:
    """What the run learns."""
    if recipe.distill.stage is None:
        from treadle.evaluation.report import objective_of

        return objective_of(recipe.tables())
    if recipe.distill.teacher is None:
        raise ConfigError("distill.stage is set without distill.teacher; use treadle distill --teacher RUN")
    from treadle.models.pretrained import load_run
    from treadle.objectives.distill import make_objective

    return make_objective(recipe.distill, load_run(recipe.distill.teacher, "cpu").model)


def _shared_data(
    recipe: Recipe, console: Console, tokenizer: Tokenizer | None, world: World
) -> dict[str, Dataset]:
    """The data, prepared by the first process while the others wait, and the same in all of them."""
    splits: dict[str, Dataset] = {}
    if world.is_main_process:
        world.on_main_first(lambda: splits.update(load_data(recipe, console, tokenizer)))
    else:
        world.on_main_first(lambda: None)
        splits = load_data(recipe, console, tokenizer)
    fingerprints = world.all_gather_object(splits["train"].fingerprint())
    for rank, other in enumerate(fingerprints):
        if other != fingerprints[0]:
            raise ConfigError(f"process {rank} reads other data than process 0: the files or tokenizers of their machines "
                              "differ; prepare once and copy, or use a folder that all see (--data.cache_dir)")  # fmt: skip
    return splits


def _take_up(trainer: Trainer, checkpoint: Checkpoint) -> None:
    if checkpoint.manifest.get("weights_only"):
        raise InputError(f"{checkpoint.folder} holds weights alone, so no run can go on from it; start one from them with "
                         f"--from {checkpoint.folder}")  # fmt: skip
    checkpoint.verify()
    _new_segment(trainer, checkpoint)


def _check_data(trainer: Trainer, data: Dataset, allow: Sequence[str]) -> None:
    from treadle.training.resolve import check_data

    if not any(word.partition(".")[0] in ("data", "tokenizer") for word in allow):
        check_data(trainer.state.data_fingerprint, data)
    trainer.state.data_fingerprint = data.fingerprint()


def _new_segment(trainer: Trainer, checkpoint: Any) -> None:
    """An explicit resume from an older step deletes nothing: logs are copied and newer checkpoints set aside."""
    from treadle.checkpoint.layout import checkpoint_name, steps_in

    newer = [step for step in steps_in(trainer.checkpoints.folder) if step > checkpoint.step]
    if not newer:
        return
    aside = free_folder(trainer.context.folder / "segments" / f"before-step-{checkpoint.step:08d}")
    aside.mkdir(parents=True)
    for name in LOGS:
        if (trainer.context.log_folder / name).exists():
            shutil.copy2(trainer.context.log_folder / name, aside / name)
    for step in newer:
        (trainer.checkpoints.folder / checkpoint_name(step)).rename(aside / checkpoint_name(step))
    trainer.checkpoints.go_back()
    trainer.console.say(f"{len(newer)} newer checkpoint(s) and the logs up to now are kept in {aside}")


def devices(request: Request) -> int:
    """How many processes `run.devices` asks this command to start: 1 in a process that a launcher started."""
    from treadle.distributed.environment import detect

    launch = detect()
    layers = request.named_layers()
    settled = settled_section(layers, "run")
    wanted = settled.devices
    if launch.size > 1:
        if wanted not in (None, 1, launch.local_size):
            raise ConfigError(f"run.devices = {wanted}, but {launch.local_size} process(es) were started on this machine; "
                              "leave the key out")  # fmt: skip
        return 1
    if wanted is not None and wanted > 1:
        from treadle.distributed.launch import refuse_too_many

        refuse_too_many(wanted, settled.device)
    return wanted or 1


def train(request: Request, console: Console | None = None) -> dict[str, Any]:
    """Trains (or continues) what was asked and returns the run's summary."""
    with opened_world(request) as world:
        return train_in(world, request, console or Console(silent=world is not None and not world.is_main_process))


@contextmanager
def opened_world(request: Request) -> Iterator[World | None]:
    """The processes this one was started with, met once for everything inside; None for a process alone, whose lock then
    answers before torch is imported."""
    from treadle.distributed.environment import detect

    if detect().size == 1:
        yield None
        return
    from treadle.distributed.world import World
    from treadle.processes import orderly_end

    layers = request.named_layers()
    world = World.open(settled_section(layers, "parallel"), settled_section(layers, "run").device)
    with orderly_end():
        try:
            with world.watching():
                yield world
        except BaseException as problem:
            if not isinstance(problem, (PeerFailed, PeerLost, Stopped)):
                world.failed(problem)
            raise
        finally:
            world.close()


def train_in(world: World | None, request: Request, console: Console) -> dict[str, Any]:
    """`train` among processes that have met."""
    folder = settled_folder(request.named_layers())
    with ExitStack() as stack:
        stack.enter_context(trusted_code.as_loaded())
        lock: RunLock | None = None

        def take_folder() -> str:
            nonlocal folder, lock
            folder = free_folder(folder) if request.fresh else folder
            lock = stack.enter_context(_locked(folder))
            return str(folder)

        folder = Path(world.on_main_first(take_folder) if world is not None else take_folder())
        _look_in_mirror(request, folder, console, world)
        recipe = configure(request, folder)
        trainer = make_trainer(request, recipe, console, world)
        _keep_what_is_needed(trainer, console)
        trainer.run_folder.adopt_lock(lock)
        if trainer.finished:
            early = trainer.state.ended
            on = trainer.callbacks[trainer.state.ended_by].how_to_go_on() if early and trainer.state.ended_by in trainer.callbacks else f"--max_steps {trainer.plan.max_steps * 2}"
            done = f"{trainer.state.step} of {trainer.plan.max_steps} steps are done" + (f" ({early})" if early else "")
            console.say(f"{folder} is finished: {done}. To go on: {on}")
            trainer.world.on_main_first(trainer.checkpoints.began)
            trainer.checkpoints.settle()
            return trainer.run_folder.summary("finished")
        summary = trainer.train()
    console.say(f"Finished at step {summary['step']}: {folder}")
    if recipe.eval.at_end and trainer.world.is_main_process:
        from treadle.evaluation.report import evaluate_run, write_results

        report = evaluate_run(str(folder), samples=3)
        write_results(folder / "results", report)
        console.say(f"Results: {folder / 'results'}")
    return summary


def _look_in_mirror(request: Request, folder: Path, console: Console, world: World | None) -> None:
    """Brings a run whose copy is ahead of what is here: most often, nothing is."""
    asked = settled_section(request.named_layers(), "checkpoint")
    if asked.mirror is None:
        return
    from treadle.checkpoint.copies import place_of
    from treadle.checkpoint.fetching import take_up
    from treadle.checkpoint.layout import steps_in
    from treadle.training.run_files import refuse_mirrored

    root, place = Path(asked.checkpoint_dir) if asked.checkpoint_dir else folder / "checkpoints", place_of(asked.mirror, folder)

    def look() -> None:
        if request.fresh:
            refuse_mirrored(asked.mirror, folder)
        elif asked.resume_from_checkpoint is None or not steps_in(root):
            step = take_up(place, folder, root, folder, console.warn)
            if step is not None:
                console.say(f"{folder} is taken from {place}: checkpoint of step {step}")

    look() if world is None else world.on_main_slowly(look)
