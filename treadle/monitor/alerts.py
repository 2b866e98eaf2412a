"""Messages to people who are elsewhere: Discord, Slack, or any JSON webhook.

Addresses come from the environment alone (DISCORD_WEBHOOK_URL, SLACK_WEBHOOK_URL, TREADLE_WEBHOOK_URL) and are written
nowhere, not even into an error. One bounded queue and one daemon thread: sending never blocks training and never raises
into it.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from treadle.monitor.settings import AlertSettings
from treadle.monitor.sinks import finite

VARIABLES = {"discord": "DISCORD_WEBHOOK_URL", "slack": "SLACK_WEBHOOK_URL", "json": "TREADLE_WEBHOOK_URL"}
QUEUE_LENGTH = 64
TIMEOUT = 5.0  # seconds a request
ATTEMPTS = 4
LONGEST_WAIT = 30.0
CLOSE_SECONDS = 8.0
# These say how a run ended or began, or come once in a lifetime; a rate limit must not swallow them.
ALWAYS = ("start", "stopped", "finished", "discovery")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could carry the message elsewhere; it counts as a failure."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Alerts:
    """Sends the chosen events to every webhook that the environment names; does nothing when there is none."""

    def __init__(
        self,
        settings: AlertSettings,
        run_name: str,
        warn: Callable[[str], None],
        environment: Mapping[str, str] = os.environ,
        first_wait: float = 1.0,
    ) -> None:
        self.settings, self.run_name, self.warn, self.first_wait = settings, run_name, warn, first_wait
        self.targets = {kind: environment[name] for kind, name in VARIABLES.items() if environment.get(name)}
        self.sent = self.failed = self.dropped = 0
        self._last: dict[str, float] = {}
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE_LENGTH)
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._warned: set[str] = set()

    def send(self, event: str, text: str, **details: Any) -> None:
        """Queues one message; drops it (and counts that) when the queue is full or the event came too soon again."""
        if not self.targets or event not in self.settings.events:
            return
        now = time.monotonic()
        if event not in ALWAYS and now - self._last.get(event, -1e9) < self.settings.minimum_seconds:
            self.dropped += 1
            return
        self._last[event] = now
        message = {"run": self.run_name, "event": event, "text": text, **finite(details)}
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="treadle-alerts", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Gives what is queued a few seconds to leave."""
        if self._thread is None:
            return
        self._closing.set()
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            pass
        self._thread.join(CLOSE_SECONDS)
        self._thread = None

    def _work(self) -> None:
        while True:
            try:
                message = self._queue.get(timeout=0.2)
            except queue.Empty:
                if self._closing.is_set():
                    return
                continue
            if message is None:
                return
            for kind, address in self.targets.items():
                try:
                    self._deliver(kind, address, message)
                except Exception as problem:  # whatever a network does must not reach training
                    self._give_up(kind, type(problem).__name__)

    def _deliver(self, kind: str, address: str, message: dict[str, Any]) -> None:
        line = f"[{message['run']}] {message['text']}"
        body: dict[str, Any] = {"content": line[:1900]} if kind == "discord" else {"text": line}
        data = json.dumps(message if kind == "json" else body).encode()
        wait, reason = self.first_wait, ""
        for attempt in range(ATTEMPTS):
            request = urllib.request.Request(
                address, data, {"Content-Type": "application/json", "User-Agent": "treadle"}, method="POST"
            )
            try:
                with self._opener.open(request, timeout=TIMEOUT) as answer:
                    answer.read(1024)
                self.sent += 1
                return
            except urllib.error.HTTPError as problem:
                reason = f"HTTP {problem.code}"
                if problem.code != 429 and problem.code < 500:
                    break  # asking again will not help
                wait = max(wait, _seconds(problem.headers.get("Retry-After")))
            except (OSError, ValueError) as problem:
                reason = type(problem).__name__
            if attempt + 1 < ATTEMPTS and not self._closing.wait(min(wait, LONGEST_WAIT)):
                wait *= 2
            elif self._closing.is_set():
                break  # the run has ended: one try, no waiting
        self._give_up(kind, reason)

    def _give_up(self, kind: str, reason: str) -> None:
        self.failed += 1
        if kind not in self._warned:  # once a run; the address stays unnamed
            self._warned.add(kind)
            self.warn(f"an alert could not be sent ({VARIABLES[kind]}: {reason}); training goes on")


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0
