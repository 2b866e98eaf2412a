"""Changes nothing: the contract of a callback, and the list that calls its hooks and names the one that fails."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from treadle.errors import CallbackError, ConfigError, Diverged, PeerFailed, PeerLost, TreadleError
from treadle.ops.memory import is_out_of_memory
from treadle.registry import Registry, nearest
from treadle.training.context import Context
from treadle.training.settings import TrainSettings

_HERE = "treadle.training.callbacks"
# The behaviours that every training has, in the order in which their hooks are called; a user's come after them.
BUILTIN = {
    "watchdog": f"{_HERE}.watchdog:WatchdogCallback",
    "commands": f"{_HERE}.commands:Commands",
    "alerts": f"{_HERE}.alerts:AlertsCallback",
    "profiler": f"{_HERE}.profiler:ProfilerCallback",
    "gradients": f"{_HERE}.gradients:Gradients",
    "recovery": f"{_HERE}.recovery:Recovery",
    "health": f"{_HERE}.health:HealthCallback",
    "progress": f"{_HERE}.progress:Progress",
    "checkpoint": f"{_HERE}.checkpoint:CheckpointSchedule",
    "evaluation": f"{_HERE}.evaluation:EvaluationSchedule",
    "sample": f"{_HERE}.sample:Sample",
    "best_model": f"{_HERE}.best_model:BestModel",
    "early_stopping": f"{_HERE}.early_stopping:EarlyStopping",
}
CALLBACKS = Registry("callback", BUILTIN, base=f"{_HERE}.base:Callback")


class Callback:
    """A behaviour around the training loop. A subclass writes the hooks it wants; each gets the Context.

    name: by which it is known in messages and checkpoints; a user's callback with the name of a built-in one takes its
    place. Hooks run in every process (context.is_main_process tells the one that writes), and what they ask for
    (context.request) is done by all. An Exception in a hook ends the training after the step, saved, with an error that
    names the callback.
    """

    name: ClassVar[str] = ""
    to_go_on: ClassVar[str] = ""  # flags that let a run go on which this callback has ended

    def __init_subclass__(cls, **keys: Any) -> None:
        super().__init_subclass__(**keys)
        if not cls.name:
            cls.name = cls.__name__

    def how_to_go_on(self) -> str:
        """What to type so that a run goes on which this callback has ended."""
        return self.to_go_on or f"leave the callback {self.name} out"

    def may_end(self, context: Context) -> bool:
        """Whether a run that this callback has ended stays finished."""
        return True

    def wanted(self, context: Context) -> bool:
        """Whether this training needs it; asked once, before anything else."""
        return True

    def on_train_start(self, context: Context) -> None:
        """Before the first step of this start; context.step says how many are done."""

    def before_step(self, context: Context) -> None:
        """Before step number context.step + 1."""

    def skip_update(self, context: Context, loss: float) -> bool:
        """Asked between backward pass and update: True leaves the weights as they are. All processes must answer alike."""
        return False

    def after_step(self, context: Context) -> None:
        """After each step: context.result, context.step_seconds."""

    def columns(self, context: Context) -> dict[str, Any] | None:
        """Further columns of a row of the log that is being made."""

    def on_log(self, context: Context) -> None:
        """A row was logged: context.row."""

    def on_evaluate(self, context: Context) -> None:
        """An evaluation is done: context.metrics."""

    def on_save(self, context: Context) -> None:
        """A checkpoint is on disk: context.saved_step."""

    def on_rollback(self, context: Context) -> None:
        """Training went back to context.step."""

    def on_restore(self, context: Context) -> None:
        """A checkpoint was taken up (after load_state_dict)."""

    def on_alert(self, context: Context, event: str, text: str, details: dict[str, Any]) -> None:
        """Somebody has something to say to people elsewhere."""

    def on_idle(self, context: Context) -> None:
        """Several times a second while a process that trains alone waits for data, and between two batches of an
        evaluation."""

    def on_stop(self, context: Context) -> None:
        """Training stops before its last step: context.stop_reason; saved already."""

    def on_train_end(self, context: Context) -> None:
        """The end, however it came: context.summary."""

    def close(self) -> None:
        """Lets go of threads and files; the last call."""

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a restart, as JSON; part of every checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what state_dict gave; {} for a checkpoint that knows nothing of this callback."""


def built_in(callback: Callback) -> bool:
    """Whether a callback is one of treadle's own."""
    return type(callback).__module__.startswith(_HERE)


class Callbacks:
    """All callbacks of a training in order."""

    def __init__(self, callbacks: Sequence[Callback], context: Context) -> None:
        self.ending = {callback.name for callback in callbacks if callback.may_end(context)}  # the same in all processes
        self.list = [callback for callback in callbacks if callback.wanted(context)]
        self.context, context.tell, context.states = context, self.call, self.state
        self.problem: TreadleError | None = None  # the first that `fail` was told of
        self._hooks: dict[str, list[tuple[Callback, Callable[..., Any]]]] = {}
        for hook, plain in vars(Callback).items():
            if callable(plain) and not hook.startswith("_"):
                self._hooks[hook] = [(c, getattr(c, hook)) for c in self.list if getattr(type(c), hook) is not plain]

    def __iter__(self) -> Iterator[Callback]:
        return iter(self.list)

    def __contains__(self, name: Any) -> bool:
        return any(callback.name == name for callback in self.list)

    def __getitem__(self, name: str) -> Any:
        for callback in self.list:
            if callback.name == name:
                return callback
        raise KeyError(name)

    def call(self, hook: str, *arguments: Any) -> list[Any]:
        """The hook of every callback that has one, with the context; what they return."""
        found, context = [], self.context
        for callback, function in self._hooks[hook]:
            before, context.caller = context.caller, callback.name
            try:
                found.append(function(context, *arguments))
            except (Diverged, PeerLost):
                raise
            except Exception as problem:
                # A built-in behaviour's own error is the same in all processes; a user's may be in one of them.
                if is_out_of_memory(problem) or (isinstance(problem, TreadleError) and built_in(callback)):
                    raise
                self._failed(callback, hook, problem)
            finally:
                context.caller = before
        return found

    def _failed(self, callback: Callback, hook: str, problem: Exception) -> None:
        frame = traceback.extract_tb(problem.__traceback__)[-1]
        said = CallbackError(f"the callback {callback.name} failed in {hook}: {type(problem).__name__}: {problem} "
                             f"({frame.filename}:{frame.lineno})")  # fmt: skip
        said.__cause__ = problem
        self.fail(said, callback.name)

    def fail(self, problem: TreadleError, by: str = "") -> None:
        """Asks for a stop instead of raising, so that all processes save and end together; only then it is raised."""
        if self.problem is None:
            self.problem = problem
            self.context.requests.ask("stop", str(problem), problem.exit_code, by, failed=True)

    @property
    def veto(self) -> Callable[[float], bool] | None:
        """`skip_update` where it could refuse the coming step; None where nobody has to know its loss before the update."""
        own = any(not built_in(callback) for callback, _ in self._hooks["skip_update"])
        asked = own or self.problem is not None or self.context.config.train.on_spike == "skip"
        return self.skip_update if asked else None

    def skip_update(self, loss: float) -> bool:
        """Whether a callback refuses the update of a step with this loss; where a user's callback is asked, a refusal or a
        failure in one process counts for all, so that no weights part ways."""
        refused = any(self.call("skip_update", loss)) or self.problem is not None
        if all(built_in(callback) for callback, _ in self._hooks["skip_update"]):
            return refused
        return bool(self.context.world.all_reduce_max([int(refused)])[0])

    def stop_asked_alone(self) -> bool:
        """While a process that trains alone waits for data; with others it waits for the step, at which all agree."""
        if self.context.world.size > 1:
            return False
        self.call("on_idle")
        return self.context.requests.stop_asked_here

    def raise_problem(self) -> None:
        """Raises what `fail` was told: here as it is, in the other processes as word of it. PeerFailed."""
        if self.problem is not None:
            raise self.problem
        requests = self.context.requests
        if "stop" in requests and requests.failed:
            raise PeerFailed(requests.reasons["stop"], requests.exit_code)

    def close(self) -> None:
        """All of them, whichever fails; what fails is said and hides no other error."""
        for callback, close in self._hooks["close"]:
            try:
                close()
            except Exception as problem:
                self.context.warn(f"the callback {callback.name} failed in close: {type(problem).__name__}: {problem}")

    def state(self) -> dict[str, dict[str, Any]]:
        """What each remembers; of callbacks that are not here now, what they last did."""
        found = dict(self.context.state.callbacks)
        for callback, function in self._hooks["state_dict"]:
            try:
                found[callback.name] = function()
                json.dumps(found[callback.name])
            except Exception as problem:
                found.pop(callback.name, None)
                self._failed(callback, "state_dict", problem)
        return found

    def load_state(self, states: dict[str, dict[str, Any]]) -> None:
        """Gives each callback its part of a saved state; CallbackError names the one that fails."""
        for callback, function in self._hooks["load_state_dict"]:
            try:
                function(states.get(callback.name, {}))
            except Exception as problem:
                raise CallbackError(f"the callback {callback.name} failed in load_state_dict: {type(problem).__name__}: "
                                    f"{problem}") from problem  # fmt: skip


def make_callbacks(given: Sequence[Any], settings: TrainSettings) -> list[Callback]:
    """The built-in callbacks and others: `given` by the objective or from Python (instances or classes), and those that the
    configuration names. One with the name of a built-in takes its place; train.disabled_callbacks are left out.
    ConfigError for two of one name, for what is no callback and for an unknown name."""
    known, disabled = [*BUILTIN, *(one.name for one in given if hasattr(one, "name"))], settings.disabled_callbacks
    for name in disabled:
        if name not in known:
            raise ConfigError(f"train.disabled_callbacks names {name!r}: {nearest(name, known)}")
    made: dict[str, Callback] = {name: CALLBACKS.get(name)() for name in BUILTIN if name not in disabled}
    for one in [*(CALLBACKS.get(name) for name in settings.callbacks), *given]:
        try:
            callback = one() if isinstance(one, type) else one
        except TypeError as problem:
            raise ConfigError(f"the callback {one.__name__} cannot be made without arguments: {problem}") from None
        if not isinstance(callback, Callback):
            raise ConfigError(f"{one!r} is no callback: write a class on top of treadle.Callback and give an instance of it")
        if callback.name in disabled and callback.name not in BUILTIN:
            continue
        if callback.name in made and callback.name not in BUILTIN:
            raise ConfigError(f"two callbacks are called {callback.name!r}; give one of them a `name` of its own")
        made[callback.name] = callback
    return list(made.values())
