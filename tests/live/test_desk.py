"""Who may ask and say what: other pages, other hosts, other users, nonsense. Nothing but a defect is a 5xx."""

from __future__ import annotations

import json
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.live.conftest import RunFolder, behind_socket
from treadle.live import server as serving
from treadle.live.desk import DATA, MAX_BODY_BYTES, PAGE, SAY, WAITING, Desk, as_json
from treadle.live.watched import Watched
from treadle.monitor.control import Control

LOCAL = {"host": "localhost:8001"}
JSON = {**LOCAL, "content-type": "application/json"}


def line(text: object, run: object = 0) -> bytes:
    return json.dumps({"run": run, "line": text}).encode()


@contextmanager
def training(folder: Path) -> Iterator[list[str]]:
    """Answers what is said to a run, as the training's loop does; gives the lines that it heard."""
    heard: list[str] = []
    over = threading.Event()

    def loop() -> None:
        while not over.is_set():
            for command in control.commands():
                heard.append(command.line)
                command.reply(f"heard {command.line}")
            time.sleep(0.01)

    control = Control(folder)  # made here: signals are another thread's
    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield heard
    finally:
        over.set()
        thread.join(5)


@pytest.fixture()
def run(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.steps(1, 4)
    return made


def desk(run: RunFolder, **more: Any) -> Desk:
    watched = Watched(run.folder)
    watched.news()
    return Desk(watched, **more)


def test_a_line_reaches_the_training_and_its_answer_comes_back(run: RunFolder) -> None:
    with training(run.folder) as heard:
        reply = desk(run).answer("POST", SAY, {**JSON, "origin": "http://localhost:8001", "sec-fetch-site": "same-origin"}, line("set optim.learning_rate=1e-4"))
    assert (reply.status, json.loads(reply.body)) == (200, {"answer": "heard set optim.learning_rate=1e-4"})
    assert heard == ["set optim.learning_rate=1e-4"]


@pytest.mark.parametrize(
    "headers",
    [{"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://localhost:9999"}, {"origin": "http://localhost:8001.evil.example"},
     {"origin": "http://evil.example/localhost:8001"}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"},
     {"host": "evil.example"}, {"host": "evil.example:8001", "origin": "http://evil.example:8001"}, {"host": "localhost.evil.example"},
     {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}, {"content-type": ""}],
)  # fmt: skip
def test_other_pages_reach_no_training(run: RunFolder, headers: dict[str, str]) -> None:
    with training(run.folder) as heard:
        reply = desk(run).answer("POST", SAY, {**JSON, **headers}, line("stop"))
        assert reply.status in (403, 415) and "answer" not in json.loads(reply.body)
        time.sleep(0.05)
        assert heard == [] and not list((run.folder / "control").glob("*"))


def test_another_name_for_this_machine_reads_nothing(run: RunFolder) -> None:
    """A name that its owner points to 127.0.0.1 makes a browser take this server for that page's own."""
    for target in (DATA, PAGE):
        assert desk(run).answer("GET", target, {"host": "evil.example:8001"}).status == 403
    assert "access-control-allow-origin" not in {name.lower() for name in desk(run).answer("GET", DATA, LOCAL).headers}


def test_a_token_is_asked_for(run: RunFolder) -> None:
    locked = desk(run, token="long-enough-secret")
    anywhere = {"host": "big-machine:8001"}
    assert locked.answer("GET", PAGE, anywhere).status == 200  # it holds nothing of the run
    assert locked.answer("GET", DATA, anywhere).status == 401
    assert locked.answer("GET", DATA, {**anywhere, "authorization": "Bearer long-enough-secreT"}).status == 401
    assert locked.answer("GET", DATA, {**anywhere, "authorization": "Bearer long-enough-secret"}).status == 200
    with training(run.folder) as heard:
        assert locked.answer("POST", SAY, {**JSON, **anywhere}, line("stop")).status == 401
        assert locked.answer("POST", SAY, {**JSON, **anywhere, "authorization": "Bearer long-enough-secret"}, line("save")).status == 200
    assert heard == ["save"]


def test_read_only_says_nothing(run: RunFolder) -> None:
    with training(run.folder) as heard:
        reading = desk(run, read_only=True)
        assert reading.answer("POST", SAY, JSON, line("status")).status == 403
        assert json.loads(reading.answer("GET", DATA, LOCAL).body)["read_only"] is True
    assert heard == []


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 400), (b"[]", 400), (b"[" * 4000, 400), (line(None), 400), (line(""), 400), (line("stop\nstop"), 400), (line("save\x00"), 400), (line("set optim.learning_rate=1\nstop"), 400), (line("x" * 1001), 400),
     (line("halt"), 400), (line("set"), 409), (line("status", 1), 404), (line("status", -1), 404), (line("status", True), 400), (line("status", "../x"), 400),
     (line("status", None), 400), (line("status", 10**30), 404), (b"x" * (MAX_BODY_BYTES + 1), 413), (b'{"run": 0, "line": "\\ud800"}', 400)],
)  # fmt: skip
def test_nonsense_is_refused_with_what_to_send(run: RunFolder, body: bytes, status: int) -> None:
    (run.folder / "LOCK").unlink()  # nobody trains: what makes sense is a conflict
    reply = desk(run).answer("POST", SAY, JSON, body)
    assert reply.status == status and json.loads(reply.body)["error"]["message"]


def test_nobody_trains(run: RunFolder) -> None:
    (run.folder / "LOCK").unlink()
    reply = desk(run).answer("POST", SAY, JSON, line("status"))
    assert reply.status == 409 and "nobody is training" in json.loads(reply.body)["error"]["message"]


def test_only_so_many_wait(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from treadle.live import desk as module

    monkeypatch.setattr(module, "ANSWER_SECONDS", 1.0)
    one, statuses = desk(run), []
    threads = [threading.Thread(target=lambda: statuses.append(one.answer("POST", SAY, JSON, line("status")).status)) for _ in range(WAITING + 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] * WAITING + [429] * 3
    with training(run.folder):
        assert one.answer("POST", SAY, JSON, line("status")).status == 200  # and their places are free again


def test_numbers_that_json_has_not(run: RunFolder) -> None:
    assert json.loads(as_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": "\ud800"})) == {"a": None, "b": [None, 1.5], "c": "\ud800"}
    run.write({"event": "odd", "step": 3, "value": 1e400, "text": "</script>\ud800"}, name="events.jsonl")
    assert desk(run).answer("GET", DATA, LOCAL).status == 200


# ---- behind a socket ----

PIECES = [b"GET", b"POST", b"HEAD", b"FOO", b"PUT", b"OPTIONS", b" ", b"/", b"/run", b"/run/data", b"/run/data?since=", b"/run/say", b"?since=a-1&since", b" HTTP/1.1", b" HTTP/1.0",
          b" HTTP/2.0", b" HTTP/9", b"\r\n", b"\n", b"Host: localhost\r\n", b"Host: evil\r\n", b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999\r\n",
          b"Content-Length: x\r\n", b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"Content-Type: application/json\r\n", b"{}", b"\x00\xff", b"%00%ff", b"/../../etc/passwd",
          b"http://[::1/", b"A: " + b"b" * 70_000 + b"\r\n", b"X: y\r\n" * 120, b"Origin: null\r\n", b"Connection: close\r\n"]  # fmt: skip


def raw(address: str, data: bytes) -> bytes:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            parts = []
            while part := connection.recv(65536):
                parts.append(part)
            return b"".join(parts)
        except OSError:
            return b""


def test_bytes_that_are_no_request(run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(3)
    with behind_socket(desk(run)) as address:
        for _ in range(400):
            good = b"POST /run/say HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 5\r\n\r\n"
            said = good if chance.random() < 0.1 else b"".join(chance.choices(PIECES, k=chance.randrange(1, 12)))
            answer = raw(address, said + b"\r\n\r\n" * chance.randrange(2))
            for status in re.findall(rb"HTTP/1\.1 (\d)\d\d ", answer):
                assert status in b"1234", (said[:200], answer[:200])
        assert b"200 OK" in raw(address, b"GET /run HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert "Traceback" not in capfd.readouterr().err


def test_the_socket_and_many_tabs(run: RunFolder) -> None:
    with behind_socket(desk(run)) as address:
        assert raw(address, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 307")
        head = raw(address, b"HEAD /run HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200") and head.endswith(b"\r\n\r\n") and b"frame-ancestors 'none'" in head
        assert raw(address, b"DELETE /run HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 405")
        idle = [socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) for _ in range(40)]
        answers: list[bytes] = []
        threads = [threading.Thread(target=lambda: answers.append(raw(address, b"GET /run/data HTTP/1.1\r\nHost: localhost\r\n\r\n"))) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)
        for connection in idle:
            connection.close()


def test_silent_connections_are_closed(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < serving.Handler.timeout <= 60
    monkeypatch.setattr(serving.Handler, "timeout", 0.2)
    with behind_socket(desk(run)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(b"POST /run/say HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{")
            assert connection.recv(1000) == b""
