"""Changes nothing by itself; answers what is said to a running training (signals, typed words, `treadle ctl`)."""

from __future__ import annotations

from treadle.checkpoint.layout import checkpoint_name, steps_in
from treadle.errors import ConfigError
from treadle.monitor.console import duration, rate
from treadle.monitor.control import HELP, Control, parse_command
from treadle.training.callbacks.base import Callback
from treadle.training.context import Context
from treadle.training.remaining import seconds_left


class Commands(Callback):
    """Words reach the first process; a signal any of them."""

    name = "commands"

    control: Control | None = None

    def on_train_start(self, context: Context) -> None:
        main = context.is_main_process
        self.control = Control(context.folder if main else None, context.say, read_stdin=context.listen and main)
        self.control.__enter__()

    def after_step(self, context: Context) -> None:
        self.on_idle(context)

    def on_idle(self, context: Context) -> None:
        control = self.control
        assert control is not None
        for command in control.commands():
            try:
                command.reply(self._carry_out(context, command.line))
            except ConfigError as problem:
                command.reply(str(problem))
        if control.save_requested:
            control.save_requested = False
            context.request("save", "SIGUSR1")
        if control.stop_reason is not None:
            context.request("stop", control.stop_reason, control.exit_code)

    def _carry_out(self, context: Context, line: str) -> str:
        word, rest = parse_command(line)
        if word == "help":
            return HELP
        if word == "status":
            return status(context)
        context.emit("command", step=context.step, line=line)
        if word == "stop":
            context.request("stop", "stop")
            return f"stopping after step {context.step}"
        if word == "save":
            context.request("save", "asked for")
            return f"saving after step {context.step}"
        if word == "eval":
            if context.eval_dataset is None:
                raise ConfigError("there is no evaluation data: nothing was held out")
            context.request("evaluate", "asked for")
            return f"evaluating after step {context.step}"
        key, equals, text = rest.partition("=")
        if not equals:
            raise ConfigError("write set KEY=VALUE, for example: set optim.learning_rate=1e-4")
        full, value = context.set(key.strip(), text.strip())
        return f"{full} = {value} from the next step on"

    def close(self) -> None:
        if self.control is not None:
            self.control.__exit__()
            self.control = None


def status(context: Context) -> str:
    """Step, loss, learning rate, tokens per second, ETA and last checkpoint, in one line."""
    state, row = context.state, context.row
    parts = [f"step {state.step} of {context.plan.max_steps}"]
    if row:
        seconds = state.seconds / max(1, state.step)
        parts += [
            context.objective.training_text(row),
            f"learning rate {row['learning_rate']:.2e}",
            f"{rate(row['tokens_per_second'])} tok/s",
            f"ETA {duration(seconds_left(context, seconds))}",
        ]
    saved = steps_in(context.checkpoint_folder)
    parts.append(f"last checkpoint {checkpoint_name(saved[0])}" if saved else "no checkpoint yet")
    if state.skipped_steps:
        parts.append(f"{state.skipped_steps} steps skipped")
    return ", ".join(part for part in parts if part)
