"""Is the run well? Spikes, outliers, collapse, a flat loss, waiting for data: each noticed once and said with its cause.

The windows are part of the run state, so that a resumed run judges as the uninterrupted one would.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

WINDOW = 128  # steps that spikes are judged against
LEAST = 32  # steps before anything is judged
FLAT_STEPS, FLAT_SHARE = 400, 0.005
WAIT_SHARE, WAIT_SECONDS = 0.1, 1.0  # of the time, after this much computing
COLLAPSE, COLLAPSE_STEPS = 0.4, 8  # of the median throughput, over this many steps
# Idle, two threads lack .01 of a core; beside another busy program .9, and take 5 times as long as one thread beside it.
CORES_LACKED, CORES_SECONDS = 0.5, 10.0  # over this many seconds


@dataclass
class Finding:
    """Something worth saying: an anomaly (also an alert), or advice (said once)."""

    kind: str
    text: str


@dataclass
class Health:
    """Running distributions of loss, gradient norm and throughput."""

    sigmas: float = 6.0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    long_losses: list[float] = field(default_factory=list)  # means of WINDOW-step stretches, for the flat test
    said: list[str] = field(default_factory=list)

    def is_spike(self, loss: float, warmed_up: bool) -> bool:
        """loss > mean + sigmas x deviation of the last 128 steps, after warm-up."""
        return warmed_up and _outlier(loss, self.losses, self.sigmas)

    def observe(
        self, step: int, loss: float, norm: float, seconds: float, tokens: int, warmed_up: bool
    ) -> list[Finding]:
        """Takes one step's numbers and returns what is new."""
        found = []
        if self.is_spike(loss, warmed_up):
            found.append(Finding("loss_spike", f"step {step}: loss {loss:.3f} is far above the last {len(self.losses)} "
                                 f"steps (mean {statistics.fmean(self.losses):.3f})"))  # fmt: skip
        if warmed_up and _outlier(norm, self.norms, self.sigmas):
            found.append(Finding("gradient_outlier", f"step {step}: gradient norm {norm:.2f} against a usual "
                                 f"{statistics.fmean(self.norms):.2f}"))  # fmt: skip
        _push(self.speeds, tokens / max(seconds, 1e-9))
        # One slow step is any other program's start; a collapse lasts.
        now, usual = statistics.median(self.speeds[-COLLAPSE_STEPS:]), statistics.median(self.speeds)
        if len(self.speeds) >= LEAST and now < COLLAPSE * usual and self._once("collapse"):
            found.append(Finding("throughput_collapse", f"step {step}: {now:.0f} tokens/s over the last {COLLAPSE_STEPS} "
                                 f"steps against a usual {usual:.0f}: is the machine shared or throttled?"))  # fmt: skip
        if math.isfinite(loss) and not self.is_spike(loss, warmed_up):
            _push(self.losses, loss)
        if math.isfinite(norm) and warmed_up:  # norms of the first steps are many times the usual
            _push(self.norms, norm)
        return found + self._advice(step)

    def _advice(self, step: int) -> list[Finding]:
        found = []
        if step % WINDOW == 0 and len(self.losses) == WINDOW and self.norms:
            self.long_losses.append(statistics.fmean(self.losses))
            spans = FLAT_STEPS // WINDOW + 1
            recent = self.long_losses[-spans:]
            if len(recent) == spans and min(recent[1:]) > recent[0] * (1 - FLAT_SHARE) and self._once("flat"):
                found.append(Finding("flat_loss", f"the loss has not fallen by {FLAT_SHARE:.1%} in {(spans - 1) * WINDOW} "
                                     "steps: the rate may be too high or too low (--learning_rate), the schedule at its "
                                     "end, or the model too small (--hidden_size)"))  # fmt: skip
            mean, deviation = _moments(self.norms)
            if deviation > mean and self._once("erratic"):
                found.append(Finding("erratic_gradient", f"the gradient norm varies by more than its mean ({mean:.2f}): try "
                                     "a lower --learning_rate, more --warmup_steps or a larger --batch_size"))  # fmt: skip
        return found

    def waiting(self, share: float, computed: float) -> list[Finding]:
        """Advice when more than a tenth of the time went into waiting for data."""
        if share > WAIT_SHARE and computed > WAIT_SECONDS and self._once("waiting"):
            return [Finding("slow_data", f"waiting for data takes {share:.0%} of the time: try --num_workers 2 or more, or a "
                            "faster disk (`treadle data prepare`)")]  # fmt: skip
        return []

    def crowded(self, seconds: float, waited: float, threads: int) -> list[Finding]:
        """Advice when other programs need the cores on which `threads` threads wait for each other. waited: seconds that all
        threads of this process together had work and no core (treadle.processes.waited_for_cores), within `seconds`."""
        lacked = waited / max(seconds, 1e-9)
        if threads > 1 and lacked > CORES_LACKED and self._once("crowded"):
            return [Finding("busy_machine", f"other programs keep {lacked:.1f} of this machine's cores from the training's {threads} "
                            "threads, and threads that wait for each other then take several times as long as fewer: Ctrl-C, and "
                            f"the same command after OMP_NUM_THREADS={max(1, threads - max(1, round(lacked)))}")]  # fmt: skip
        return []

    def _once(self, kind: str) -> bool:
        if kind in self.said:
            return False
        self.said.append(kind)
        return True

    def to_json(self) -> dict[str, Any]:
        """The distributions so far, for run_state.json. That the machine is busy is said in each start anew."""
        return {"losses": self.losses, "norms": self.norms, "speeds": self.speeds, "long_losses": self.long_losses[-8:],
                "said": [kind for kind in self.said if kind != "crowded"]}  # fmt: skip


def _push(window: list[float], value: float) -> None:
    window.append(value)
    if len(window) > WINDOW:
        del window[0]


def _outlier(value: float, window: list[float], sigmas: float) -> bool:
    if len(window) < LEAST or not math.isfinite(value):
        return False
    mean, deviation = _moments(window)
    # A deviation near zero would call the smallest change a spike.
    return value > mean + sigmas * max(deviation, 0.01 * abs(mean))


def _moments(window: list[float]) -> tuple[float, float]:
    """Mean and standard deviation; in plain floats, since `statistics` counts exactly and takes many times as long."""
    mean = sum(window) / len(window)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in window) / len(window))
