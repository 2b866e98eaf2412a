"""Changes nothing; sends messages to the webhooks that the environment names (section [alerts])."""

from __future__ import annotations

from typing import Any

from treadle.monitor.alerts import Alerts
from treadle.training.callbacks.base import Callback
from treadle.training.context import Context


class AlertsCallback(Callback):
    """Tells webhooks what happens to a run."""

    name = "alerts"

    alerts: Alerts | None = None

    def wanted(self, context: Context) -> bool:
        return context.is_main_process

    def on_train_start(self, context: Context) -> None:
        step, begun = context.step, "resumed" if context.step else "started"
        self.on_alert(context, "start", f"{begun} at step {step} of {context.plan.max_steps}", {"step": step})

    def after_step(self, context: Context) -> None:
        every = context.config.alerts.alert_steps
        if every and context.step % every == 0 and context.result is not None:
            text = f"step {context.step} of {context.plan.max_steps}: loss {context.result.loss:.4f}"
            self.on_alert(context, "step", text, {"step": context.step})

    def on_alert(self, context: Context, event: str, text: str, details: dict[str, Any]) -> None:
        if self.alerts is None:
            self.alerts = Alerts(context.config.alerts, context.config.name, context.warn)
        self.alerts.send(event, text, **details)

    def close(self) -> None:
        if self.alerts is not None:
            self.alerts.close()
            self.alerts = None
