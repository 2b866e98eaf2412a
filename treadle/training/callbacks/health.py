"""Changes nothing; notices spikes, outliers, collapse, waiting for data and for cores, says them, and asks what train.on_spike says."""

from __future__ import annotations

import time
from typing import Any

import torch

from treadle.errors import Diverged
from treadle.monitor.health import CORES_SECONDS, Finding, Health
from treadle.processes import waited_for_cores
from treadle.training.callbacks.base import Callback
from treadle.training.context import Context


class HealthCallback(Callback):
    """Watches loss, gradient norm and throughput."""

    name = "health"

    def __init__(self) -> None:
        self.health = Health()
        self.cores_since = (0.0, 0.0)  # clock and seconds without a core when they were last compared

    def on_train_start(self, context: Context) -> None:
        self.cores_since = (time.perf_counter(), waited_for_cores())

    def skip_update(self, context: Context, loss: float) -> bool:
        if context.config.train.on_spike != "skip":
            return False
        self.health.sigmas = context.config.train.spike_sigmas
        return self.health.is_spike(loss, context.warmed_up)

    def after_step(self, context: Context) -> None:
        result = context.result
        assert result is not None
        self.health.sigmas = context.config.train.spike_sigmas
        self._report(context, self.health.observe(
            context.step, result.loss, result.grad_norm, context.step_seconds, result.counts.get("tokens", 0),
            context.warmed_up,
        ))  # fmt: skip
        if context.device.type == "cpu":
            self._look_for_cores(context)

    def _look_for_cores(self, context: Context) -> None:
        now, (then, waited_then) = time.perf_counter(), self.cores_since
        if now - then >= CORES_SECONDS:
            waited = waited_for_cores()
            self.cores_since = (now, waited)
            self._report(context, self.health.crowded(now - then, waited - waited_then, torch.get_num_threads()))

    def on_log(self, context: Context) -> None:
        self._report(context, self.health.waiting(context.data_wait_share, context.computed))

    def _report(self, context: Context, findings: list[Finding]) -> None:
        policy = context.config.train.on_spike
        for finding in findings:
            context.emit(finding.kind, step=context.step, text=finding.text)
            context.warn(finding.text)
            context.alert("anomaly", finding.text, kind=finding.kind, step=context.step)
            if finding.kind == "loss_spike" and policy == "stop":
                raise Diverged(f"{finding.text}; on_spike = stop. Try a lower --learning_rate, or --on_spike skip")
            if finding.kind == "loss_spike" and policy == "rollback":
                context.request("rollback", finding.text)

    def state_dict(self) -> dict[str, Any]:
        return self.health.to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.health = Health(**state)
