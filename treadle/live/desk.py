"""What the page of a live run asks and is answered, over whichever server: addresses -> answers. Reads run folders, and
says words to a training through the channel of `treadle ctl`. No path of a request reaches the file system: a run is
named by its number."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from treadle.errors import TreadleError
from treadle.live.page import page
from treadle.live.watched import Watched
from treadle.monitor.control import parse_command, send
from treadle.monitor.sinks import finite
from treadle.serving.limits import Access, RequestError

PAGE, DATA, SAY = "/run", "/run/data", "/run/say"
METHODS = {PAGE: "GET", DATA: "GET", SAY: "POST"}
MAX_BODY_BYTES = 4096  # a command is a line
MAX_LINE = 1000  # characters
ANSWER_SECONDS = 20.0  # that a click waits for the end of a step; later the training does what was asked all the same
WAITING = 8  # commands that wait for their answers at once, each in a thread
PLAIN = {"Cross-Origin-Resource-Policy": "same-origin"}


class Reply(NamedTuple):
    """status and headers of HTTP; body: bytes of the type."""

    status: int
    body: bytes
    type: str = "application/json"
    headers: dict[str, str] = {}  # noqa: RUF012 - nobody adds to it


class Desk:
    """`watched`: what is shown. token: what clients send, None: programs of this machine alone may ask. read_only: no word
    reaches a training from here."""

    def __init__(self, watched: Watched, token: str | None = None, read_only: bool = False) -> None:
        self._watched, self._access, self._read_only = watched, Access(token, PAGE), read_only
        self._waiting = threading.BoundedSemaphore(WAITING)

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes = b"") -> Reply:
        """headers: names in lower case. Every request that makes no sense has an answer below 500."""
        try:
            return self._answer(method, target, headers, body)
        except RequestError as problem:
            return Reply(problem.status, as_json(problem.body()), headers={**PLAIN, **problem.headers})

    def _answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Reply:
        try:
            parts = urlsplit(target)
        except ValueError:
            raise RequestError(400, "this is no address") from None
        self._access.check(headers, parts.path)
        wanted = METHODS.get(parts.path)
        if wanted is None:
            raise RequestError(404, f"there is nothing under this address; there is {', '.join(METHODS)}")
        if method != wanted and not (method == "HEAD" and wanted == "GET"):
            raise RequestError(405, f"{parts.path} takes {wanted}, not {method[:20]}", Allow=wanted)
        if parts.path == PAGE:
            text, guards = page()
            return Reply(200, text, "text/html; charset=utf-8", {**PLAIN, **guards})
        if parts.path == DATA:
            since = parse_qs(parts.query, max_num_fields=None).get("since", [""])[-1]
            return Reply(200, as_json({**self._watched.news(since[:100]), "read_only": self._read_only}), headers=dict(PLAIN))
        return Reply(200, as_json({"answer": self._say(headers, body)}), headers=dict(PLAIN))

    def _say(self, headers: Mapping[str, str], body: bytes) -> str:
        """A line of `treadle ctl` and its answer. 4xx where it comes from elsewhere, makes no sense, or nobody is training."""
        own_page_only(headers)
        if self._read_only:
            raise RequestError(403, "this page only watches: it was started with --read-only", code="read_only")
        folder, line = self._asked(body)
        if not self._waiting.acquire(blocking=False):
            raise RequestError(429, f"{WAITING} commands wait for their answers already", Retry_After="5")
        try:
            return send(folder, line, ANSWER_SECONDS)
        except TreadleError as problem:
            raise RequestError(409, str(problem), "line") from None
        except OSError as problem:
            raise RequestError(409, f"{folder} takes no commands now: {problem}", "run") from None
        finally:
            self._waiting.release()

    def _asked(self, body: bytes) -> tuple[Path, str]:
        """(folder of the run, the line)."""
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(413, f"the body has more than {MAX_BODY_BYTES} bytes")
        example = '{"run": 0, "line": "status"}'
        try:
            table = json.loads(body)
        except (ValueError, RecursionError):
            raise RequestError(400, f"the body is no JSON; send {example}") from None
        if not isinstance(table, dict):
            raise RequestError(400, f"the body is no object; send {example}")
        number, line = table.get("run", 0), table.get("line")
        if type(number) is not int:
            raise RequestError(400, f"run is the number of a run: {example}", "run")
        folder = self._watched.folder(number)
        if folder is None:
            raise RequestError(404, f"there is no run {number}", "run")
        if not isinstance(line, str) or not line.strip() or len(line) > MAX_LINE or not line.isprintable():
            raise RequestError(400, f"line is one line of at most {MAX_LINE} characters: {example}", "line")
        try:
            parse_command(line)
        except TreadleError as problem:
            raise RequestError(400, str(problem), "line") from None
        return folder, line


def own_page_only(headers: Mapping[str, str]) -> None:
    """RequestError 403 for what a page from elsewhere makes a browser send, 415 for what a form can send without asking."""
    origin, host = headers.get("origin"), headers.get("host", "")
    site = headers.get("sec-fetch-site", "same-origin")
    if (origin is not None and origin.partition("://")[2] != host) or site not in ("same-origin", "none"):
        raise RequestError(403, "commands are taken from this server's own page and from programs, not from other pages")
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "send JSON, with Content-Type: application/json")


def as_json(table: Any) -> bytes:
    """ASCII JSON; numbers that are not finite become null."""
    try:
        return json.dumps(table, separators=(",", ":"), allow_nan=False).encode("ascii")
    except ValueError:
        return json.dumps(finite(table), separators=(",", ":"), allow_nan=False).encode("ascii")
