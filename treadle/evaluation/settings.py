"""The [eval] section."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from treadle.settings import Fallback, Settings, option

PATIENCE = 3  # evaluations, where early stopping is asked for without a number


def _early_stopping(value: Any) -> dict[str, Any]:
    if not isinstance(value, bool):
        raise ValueError
    return {"eval.early_stopping_patience": Fallback(PATIENCE)} if value else {}


class EvalSettings(Settings):
    """How good it is, measured while it trains."""

    eval_steps: int | None = option(None, aliases=("eval_interval",), ge=1)
    """Steps between evaluations on held-out text; without it a tenth of the run. The last step is always evaluated."""

    eval_on_start: bool = option(False)
    """Evaluate before the first step too: what the weights of --from were worth."""

    eval_rows: int | None = option(256, ge=1)
    """Rows of held-out text used while training; `treadle eval` uses all."""

    per_device_eval_batch_size: int | None = option(None, aliases=("eval_batch_size",), ge=1)
    """Rows in one evaluation pass; without it the training batch size."""

    sample_tokens: int = option(100, ge=0)
    """Length of the text sample written at each evaluation; 0 writes none."""

    sample_prompt: str = option("")
    """What the sample continues; empty starts from the end-of-document token."""

    early_stopping_patience: int | None = option(None, aliases=("patience",), ge=1)
    """Stop after this many evaluations without a better early_stopping_metric."""

    early_stopping_threshold: float = option(0.0, aliases=("threshold",), ge=0.0)
    """By how much it must be better to count."""

    early_stopping_metric: str = option("loss")
    """The metric that has to get better, in the direction that the objective gives it."""

    target_loss: float | None = option(None, aliases=("stop_loss", "loss_target"))
    """Stop once the loss is this low, on what target_loss_on says; below what anyone can reach honestly it is refused."""

    target_loss_on: Literal["validation", "train"] = option("validation")
    """validation: the loss of an evaluation (eval_rows rows never trained on); train: the mean over the steps since the last row
    of the log (logging_steps)."""

    at_end: bool = option(False)
    """After the last step evaluate everything and write results/evaluation_results.json and results/generations.txt."""

    translations: ClassVar[dict[str, Callable[[Any], dict[str, Any]]]] = {
        "early_stopping": _early_stopping,
        "use_early_stopping": _early_stopping,
    }
    switches: ClassVar[dict[str, tuple[str, ...]]] = dict.fromkeys(translations, ("early_stopping_patience", "early_stopping_threshold"))

    @model_validator(mode="after")
    def _consistent(self) -> EvalSettings:
        if self.early_stopping_threshold > 0 and self.early_stopping_patience is None:
            raise ValueError("early_stopping_threshold needs early_stopping_patience")
        return self
