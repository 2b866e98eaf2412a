"""The [log] section."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, model_validator

from treadle.settings import ListChange, Settings, option

Sink = Literal["csv", "jsonl", "tensorboard", "wandb"]
FILE_SINKS: list[Sink] = ["csv", "jsonl"]  # files of the run's folder, which need no package and cost next to nothing
DEFAULT_SINKS: list[Sink] = [*FILE_SINKS, "tensorboard"]


def _with(sink: Sink) -> Callable[[Any], dict[str, Any]]:
    def translate(value: Any) -> dict[str, Any]:
        if not isinstance(value, bool):
            raise ValueError
        return {"log.report_to": ListChange(add=(sink,)) if value else ListChange(remove=(sink,))}

    return translate


def _report_to(value: Any) -> Any:
    """What Hugging Face's `report_to` takes beside names: "all" and "none"."""
    word = value[0] if isinstance(value, list) and len(value) == 1 else value
    if word is None or (isinstance(word, str) and word.lower() == "none"):
        return []
    return list(typing.get_args(Sink)) if isinstance(word, str) and word.lower() == "all" else value


AlertEvent = Literal["start", "stopped", "finished", "step", "best", "anomaly", "discovery"]


class AlertSettings(Settings):
    """Who is told elsewhere; webhook addresses come from DISCORD_WEBHOOK_URL, SLACK_WEBHOOK_URL, TREADLE_WEBHOOK_URL."""

    called: ClassVar[str] = "alerts"

    events: list[AlertEvent] = option(["start", "stopped", "finished", "step", "best", "anomaly", "discovery"])
    """Which events are sent to the webhooks that the environment names (none named: nothing is sent)."""

    alert_steps: int | None = option(None, ge=1)
    """Send a message every so many steps; without it none."""

    minimum_seconds: float = option(30.0, ge=0.0)
    """At most one message of a kind in this time (start, stop, finish and discoveries are always sent)."""


class LogSettings(Settings):
    """What people see."""

    logging_steps: int = option(10, aliases=("log_steps", "log_interval"), ge=1)
    """Steps between log lines and metrics rows."""

    report_to: Annotated[list[Sink], BeforeValidator(_report_to)] = option(DEFAULT_SINKS)
    """Where metrics go: csv, jsonl, tensorboard, wandb (extra; WANDB_MODE=offline works without a network)."""

    project: str = option("treadle", aliases=("wandb_project",))
    """The Weights & Biases project."""

    log_dir: str | None = option(None, aliases=("logging_dir", "tensorboard_dir"))
    """Where metrics, TensorBoard files and samples go; default the run folder."""

    health: bool = option(False)
    """Also log the size of each block's gradients and activations."""

    profile: str | None = option(None)
    """START:STEPS writes a trace of these steps to the run's trace.json."""

    translations: ClassVar[dict[str, Callable[[Any], dict[str, Any]]]] = {
        "use_tensorboard": _with("tensorboard"),
        "use_wandb": _with("wandb"),
    }

    @model_validator(mode="after")
    def _consistent(self) -> LogSettings:
        if self.profile is not None and not re.fullmatch(r"[1-9]\d*:[1-9]\d*", self.profile):
            raise ValueError("profile must be START:STEPS, for example 20:5")
        return self
