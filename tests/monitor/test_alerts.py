"""Alerts against a real local HTTP server that answers, is slow, refuses, redirects, limits, fails or is not there."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY, make_text
from treadle.monitor.alerts import Alerts
from treadle.monitor.console import Console
from treadle.monitor.settings import AlertSettings
from treadle.start import Request, train

CANARY = "CANARY-7d1f"


class Server:
    """Answers each request with the next of `answers` (status, headers, delay), then with 204."""

    def __init__(self) -> None:
        self.received: list[tuple[str, dict[str, Any]]] = []
        self.answers: list[tuple[int, dict[str, str], float]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                owner.received.append((self.path, json.loads(data)))
                status, headers, delay = owner.answers.pop(0) if owner.answers else (204, {}, 0.0)
                time.sleep(delay)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/{CANARY}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture()
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()


def alerts(server: Server, kind: str = "TREADLE", said: list[str] | None = None, **settings: Any) -> Alerts:
    sink = said if said is not None else []
    return Alerts(AlertSettings(**{"minimum_seconds": 0.0, **settings}), "r", sink.append,
                  {f"{kind}_WEBHOOK_URL": server.url}, first_wait=0.05)  # fmt: skip


def settle(made: Alerts, count: int, seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while made.sent + made.failed < count and time.monotonic() < until:
        time.sleep(0.01)


@pytest.mark.parametrize(("kind", "key"), [("DISCORD", "content"), ("SLACK", "text"), ("TREADLE", "text")])
def test_each_kind_gets_its_own_form(server: Server, kind: str, key: str) -> None:
    made = alerts(server, kind)
    made.send("best", "a new best", loss=1.5, bad=float("nan"))
    made.close()
    ((_, body),) = server.received
    assert "a new best" in body[key] and made.sent == 1
    if kind == "TREADLE":
        assert body == {"run": "r", "event": "best", "text": "a new best", "loss": 1.5, "bad": None}


@pytest.mark.parametrize("answer", [(500, {}, 0.0), (429, {"Retry-After": "0.1"}, 0.0), (503, {}, 0.0)])
def test_passing_trouble_is_tried_again(server: Server, answer: tuple) -> None:
    server.answers = [answer, answer]
    made = alerts(server)
    made.send("best", "x")
    settle(made, 1)
    assert made.sent == 1 and made.failed == 0 and len(server.received) == 3
    made.close()


@pytest.mark.parametrize("answer", [(404, {}, 0.0), (302, {"Location": "http://127.0.0.1:1/elsewhere"}, 0.0)])
def test_refusals_and_redirects_are_final_and_named_without_the_address(server: Server, answer: tuple) -> None:
    server.answers, said = [answer] * 9, []
    made = alerts(server, said=said)
    made.send("best", "x")
    made.send("anomaly", "y")
    settle(made, 2)
    made.close()
    assert made.failed == 2 and len(server.received) == 2 and len(said) == 1
    assert f"HTTP {answer[0]}" in said[0] and CANARY not in said[0] and "TREADLE_WEBHOOK_URL" in said[0]


def test_rate_limits_and_choices(server: Server) -> None:
    made = alerts(server, minimum_seconds=60.0, events=["best", "stopped"])
    for _ in range(5):
        made.send("best", "x")
        made.send("stopped", "x")  # how a run ended is never swallowed
        made.send("anomaly", "not chosen")
    made.close()
    assert [b["event"] for _, b in server.received].count("best") == 1 and len(server.received) == 6
    assert made.dropped == 4


def test_a_dead_or_slow_end_blocks_nothing(server: Server) -> None:
    server.answers = [(204, {}, 3.0)] * 200
    made = alerts(server)
    begun = time.monotonic()
    for _ in range(500):
        made.send("anomaly", "x" * 1000)
    assert time.monotonic() - begun < 0.5 and made.dropped > 400
    nobody = Alerts(
        AlertSettings(minimum_seconds=0.0), "r", lambda text: None, {"SLACK_WEBHOOK_URL": "http://127.0.0.1:1/x"}
    )
    nobody.send("best", "x")
    begun = time.monotonic()
    nobody.close()
    assert time.monotonic() - begun < 7 and nobody.failed == 1
    odd = Alerts(AlertSettings(minimum_seconds=0.0), "r", lambda text: None, {"SLACK_WEBHOOK_URL": "not an address"})
    odd.send("best", "x")
    odd.close()
    assert odd.failed == 1


@pytest.mark.parametrize("trouble", ["up", "down", "failing", "redirecting"])
def test_a_training_is_the_same_and_keeps_the_secret(
    server: Server, in_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], trouble: str
) -> None:
    """Bit-equal to a run without alerts, whatever the webhook does; its address occurs in no file and no output."""
    (in_folder / "t.txt").write_text(make_text())
    keys = {**TINY, "max_steps": "8", "eval_steps": "4", "alert_steps": "2", "minimum_seconds": "0"}
    train(Request("t.txt", {**keys, "run_name": "quiet"}), Console(quiet=True))
    server.answers = {"failing": [(500, {}, 0.0)] * 99, "redirecting": [(302, {"Location": server.url}, 0.0)] * 99}.get(
        trouble, []
    )
    address = server.url if trouble != "down" else f"http://127.0.0.1:1/{CANARY}"
    monkeypatch.setenv("TREADLE_WEBHOOK_URL", address)
    train(Request("t.txt", {**keys, "run_name": "loud"}), Console())
    one, two = (
        (in_folder / "runs" / n / "checkpoints" / "step-00000008" / "model.safetensors").read_bytes()
        for n in ("quiet", "loud")
    )
    assert one == two
    if trouble == "up":
        events = [body["event"] for _, body in server.received]
        assert events[0] == "start" and events[-1] == "finished" and {"best", "step"} <= set(events)
    out = capfd.readouterr()
    assert CANARY not in out.out + out.err
    for path in in_folder.rglob("*"):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path
