"""Carrying out what was said to a running training: status, save, eval, set, stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from treadle.checkpoint.layout import checkpoint_name, steps_in
from treadle.errors import ConfigError
from treadle.monitor.console import duration, rate
from treadle.monitor.control import EXIT_CODES, HELP, Command, parse_command
from treadle.registry import nearest
from treadle.settings import fit_value
from treadle.training import resolve
from treadle.training.config import SECTIONS

if TYPE_CHECKING:
    from treadle.training.trainer import Trainer

STOP_REASONS = {code: number.name for number, code in EXIT_CODES.items()}

# Keys that mean something from one step to the next.
SETTABLE = (
    "optim.learning_rate", "optim.min_lr_ratio", "log.logging_steps", "eval.eval_steps", "checkpoint.save_steps",
    "alerts.alert_steps", "train.on_spike",
)  # fmt: skip


def obey(trainer: Trainer) -> bool:
    """Carries out everything said since the last call; true when the run shall stop. All processes call it at the same
    moment and do the same: a signal to one of them counts for all, words come from the first."""
    control, world, wishes = trainer.control, trainer.world, trainer.wishes
    commands = control.commands()
    asked, control.save_requested = control.save_requested, False
    heard = [control.exit_code if control.should_stop() else 0, asked, len(commands), trainer.saver.busy, trainer.saver.ended]
    code, save, said, busy, ended = world.all_reduce_max([int(h) for h in heard])
    if said and world.size > 1:
        lines = world.on_main_first(lambda: [command.line for command in commands])
        commands = commands if world.is_main_process else [Command(line, lambda text: None) for line in lines]
    _answer(trainer, commands)
    if code and not wishes.stop:
        control.request_stop(STOP_REASONS.get(code, "stop"), code)
        control.exit_code = code
    wishes.stop |= bool(code)
    wishes.save |= bool(save)
    trainer.saving_ended = bool(ended and not busy)
    return wishes.stop


def obey_alone(trainer: Trainer) -> bool:
    """The same while this process waits for data; with others it waits for the step, at which all agree."""
    return trainer.world.size == 1 and obey(trainer)


def _answer(trainer: Trainer, commands: list[Command]) -> None:
    for command in commands:
        try:
            command.reply(_carry_out(trainer, command.line))
        except ConfigError as problem:
            command.reply(str(problem))


def _carry_out(trainer: Trainer, line: str) -> str:
    word, rest = parse_command(line)
    if word == "help":
        return HELP
    if word == "status":
        return status(trainer)
    trainer.event("command", step=trainer.state.step, line=line)
    if word == "stop":
        trainer.control.request_stop("stop")
        trainer.wishes.stop = True
        return f"stopping after step {trainer.state.step}"
    if word == "save":
        trainer.wishes.save = True
        return f"saving after step {trainer.state.step}"
    if word == "eval":
        if trainer.eval_dataset is None:
            raise ConfigError("there is no evaluation data: nothing was held out")
        trainer.wishes.evaluate = True
        return f"evaluating after step {trainer.state.step}"
    key, equals, text = rest.partition("=")
    if not equals:
        raise ConfigError("write set KEY=VALUE, for example: set optim.learning_rate=1e-4")
    full = _full_key(key.strip())
    value = change(trainer, full, text.strip())
    trainer.state.settings[full] = value
    return f"{full} = {value} from the next step on"


def _full_key(word: str) -> str:
    found = [key for key in SETTABLE if word in (key, key.partition(".")[2])]
    if not found:
        raise ConfigError(f"{word!r} cannot be set while training: {nearest(word, list(SETTABLE))}")
    return found[0]


def change(trainer: Trainer, key: str, value: Any) -> Any:
    """Sets one key of the trainer's configuration; ConfigError when the value does not fit."""
    section, _, name = key.partition(".")
    fitted = fit_value(SECTIONS[section], name, value, from_text=isinstance(value, str))
    setattr(trainer.recipe.section(section), name, fitted)
    trainer.plan = resolve.schedule(trainer.recipe, trainer.dataset, trainer.world.size)
    return fitted


def status(trainer: Trainer) -> str:
    """Step, loss, learning rate, tokens per second, ETA and last checkpoint, in one line."""
    state, row = trainer.state, trainer.last_row
    parts = [f"step {state.step} of {trainer.plan.max_steps}"]
    if row:
        seconds = state.seconds / max(1, state.step)
        parts += [
            f"loss {row['loss']:.4f}",
            f"learning rate {row['learning_rate']:.2e}",
            f"{rate(row['tokens_per_second'])} tok/s",
            f"ETA {duration(seconds * (trainer.plan.max_steps - state.step))}",
        ]
    saved = steps_in(trainer.checkpoints)
    parts.append(f"last checkpoint {checkpoint_name(saved[0])}" if saved else "no checkpoint yet")
    if state.skipped_steps:
        parts.append(f"{state.skipped_steps} steps skipped")
    return ", ".join(parts)
