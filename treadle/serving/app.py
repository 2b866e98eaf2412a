"""The application behind `treadle serve`: addresses -> answers. No path of a request ever reaches the file system."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from treadle import terminal
from treadle.serving import fields, page, protocol
from treadle.serving.chunk_marks import ChunkMarks
from treadle.serving.delivery import Answer, Receive, Scope, Send, Works, as_json, respond
from treadle.serving.limits import Access, RequestError
from treadle.serving.protocol import Asked, Served
from treadle.serving.token_names import TokenNames

IN_THREAD = 16_384  # bytes of a body from which on its text is encoded beside the loop: 16 KB are about 5 ms
# What the engine's numbers are (Engine.stats), and their types for Prometheus.
METRICS = {
    "running": ("Requests that are answered now.", "gauge"),
    "waiting": ("Requests that wait for a row.", "gauge"),
    "rows": ("Requests that share a forward pass at most.", "gauge"),
    "max_len": ("Tokens of a prompt and its answer at most.", "gauge"),
    "generated_tokens": ("Tokens generated so far.", "counter"),
    "prompt_tokens": ("Tokens of prompts read so far.", "counter"),
    "tokens_per_second": ("Generated tokens by the seconds in which there was work.", "gauge"),
    "state_bytes": ("Bytes of the decoding state.", "gauge"),
}
METHODS = {"/": "GET", "/health": "GET", "/metrics": "GET", "/v1/models": "GET", "/v1/completions": "POST",
           "/v1/chat/completions": "POST", "/v1/chunks": "POST"}  # fmt: skip


LIVE = "/run"  # the page of the run that is served, and below it what that page asks
LIVE_THREADS = 12  # its own, since a command waits for the end of a training step: more than it lets wait


class Live(Protocol):
    """What the server needs of live/desk.py's Desk: (status, body, type of the body, headers) for a request."""

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes, str, dict[str, str]]: ...


class App:
    """An ASGI application. model: what `chunks` are asked of; counts: answers by status, and clients that hung up; live: follows
    the run that the model is of."""

    def __init__(self, engine: Works, served: Served, *, token: str | None = None, marks: ChunkMarks | None = None,
                 fingerprint: str = "", created: int = 0, live: Live | None = None) -> None:  # fmt: skip
        self._engine, self._served, self._access, self._marks = engine, served, Access(token, "/", LIVE), marks
        self._live, self._live_threads = live, ThreadPoolExecutor(LIVE_THREADS, "treadle-live")
        self._fingerprint, self._created = fingerprint, created
        self._names = TokenNames(served.tokenizer)
        self.counts: Counter[str] = Counter()
        self.ending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # no websockets, and nothing to do when the server starts
            if scope["type"] == "websocket":
                await receive()
                await send({"type": "websocket.close", "code": 1000})
            return
        begun = False

        async def sends(message: Any) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self.counts[str(message["status"])] += 1
            await send(message)

        try:
            await self._answer(scope, receive, sends)
        except RequestError as problem:
            await respond(sends, problem.status, as_json(problem.body()), headers=problem.headers)
        except _Gone:
            self.counts["hung_up"] += 1
        except Exception:  # a defect: the operator reads where, the client that there is one
            terminal.write(traceback.format_exc(), sys.stderr, end="")
            if not begun:
                await respond(sends, 500, as_json(RequestError(500, "an error inside the server; its log says more").body()))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.requests import Request

        request = Request(scope, receive)
        path, method = scope["path"], scope["method"]
        self._access.check(request.headers, path)
        if self._live is not None and (path == LIVE or path.startswith(f"{LIVE}/")):
            await self._of_run(self._live, request, send)
            return
        name = path.removeprefix("/v1/models/") if path.startswith("/v1/models/") else None
        wanted = "GET" if name is not None else METHODS.get(path)
        if wanted is None:
            raise RequestError(404, f"there is nothing under this address; there is {', '.join(METHODS)}")
        if method != wanted and not (method == "HEAD" and wanted == "GET"):
            raise RequestError(405, f"{path if name is None else '/v1/models'} takes {wanted}, not {method[:20]}", Allow=wanted)
        if wanted == "GET":
            if name is not None and name != self._served.name:
                raise RequestError(404, f"there is one model here, {self._served.name!r}", "model", "model_not_found")
            await self._get(path if name is None else "model", send)
            return
        body = await self._body(request)
        if path == "/v1/chunks":
            await self._chunks(body, send)
            return
        read: Callable[[dict[str, Any], Served], Asked] = protocol.chat if path == "/v1/chat/completions" else protocol.completion
        asked = await _beside(body, lambda: read(fields.parsed(body), self._served))
        if self.ending:
            raise RequestError(503, "the server is ending; it takes no new requests", code="stopping", Retry_After="10", Connection="close")
        answer = Answer(self._engine, self._served, self._names, self._fingerprint, asked)
        await answer(scope, receive, send)
        self.counts["hung_up"] += answer.hung_up

    async def _of_run(self, live: Live, request: Any, send: Send) -> None:
        body = await self._body(request) if request.method == "POST" else b""
        target = f"{request.scope['path']}?{request.scope.get('query_string', b'').decode('latin-1')}"
        work = asyncio.get_running_loop().run_in_executor(self._live_threads, live.answer, request.method, target, dict(request.headers), body)
        status, content, kind, headers = await work
        await respond(send, status, content, kind.encode(), headers)

    async def _get(self, what: str, send: Send) -> None:
        if what == "/":
            body, headers = page.page()
            await respond(send, 200, body, b"text/html; charset=utf-8", headers)
            return
        if what == "/metrics":
            await respond(send, 200, self._metrics().encode(), b"text/plain; version=0.0.4; charset=utf-8")
            return
        table: Any = {"status": "ending" if self.ending else "ok"}
        if what != "/health":
            limits = self._served.limits
            table = {"id": self._served.name, "object": "model", "created": self._created, "owned_by": "treadle",
                     "max_prompt_tokens": limits.max_prompt_tokens, "max_new_tokens": limits.max_new_tokens,
                     "defaults": self._defaults(), "chat": self._served.template is not None, "chunks": self._marks is not None, "run": self._live is not None}  # fmt: skip
        await respond(send, 200, as_json({"object": "list", "data": [table]} if what == "/v1/models" else table))

    def _defaults(self) -> dict[str, float]:
        """How tokens are drawn where a request says nothing."""
        return {name: self._served.default(name) for name in ("temperature", "top_p", "top_k")}

    async def _body(self, request: Any) -> bytes:
        """The bytes of a JSON body, at most so many and in at most so many seconds."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # of a page of somebody else's a browser sends other kinds without asking first
            raise RequestError(415, "send JSON, with Content-Type: application/json")
        limits = self._served.limits
        large = RequestError(413, f"the body has more than {limits.max_body_bytes} bytes", Connection="close")
        length = request.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > limits.max_body_bytes):
            raise large
        parts, size = [], 0
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    if size > limits.max_body_bytes:
                        raise large
        except TimeoutError:
            raise RequestError(408, f"the body did not arrive within {limits.body_seconds:g} seconds", Connection="close") from None
        except RequestError:
            raise
        except Exception as problem:
            if type(problem).__name__ == "ClientDisconnect":
                raise _Gone from None
            raise
        return b"".join(parts)

    async def _chunks(self, body: bytes, send: Send) -> None:
        """Where a hierarchical model begins chunks in a text: {"stages": [[offset in characters, ...], ...]}."""
        table = fields.parsed(body)
        said = fields.text(table.get("text"), "text")
        marks, most = self._marks, self._served.limits.max_len
        if marks is None:
            raise RequestError(400, f"{self._served.name} finds no chunks in text; models of the architecture hnet do")
        await respond(send, 200, as_json({"stages": await asyncio.to_thread(marks.of, said, most)}))

    def _metrics(self) -> str:
        """Numbers in Prometheus' text format, each with its help and type."""
        lines: list[str] = []
        for name, value in sorted(self._engine.stats().items()):
            if isinstance(value, (int, float)):
                meaning, kind = METRICS.get(name, (name.replace("_", " "), "gauge"))
                lines += _described(f"treadle_{name}", meaning, kind)
                lines.append(f"treadle_{name} {value:g}" if isinstance(value, float) else f"treadle_{name} {value}")
        statuses = {name: count for name, count in sorted(self.counts.items()) if name.isdigit()}
        lines += _described("treadle_responses_total", "Responses so far, by their HTTP status.", "counter") if statuses else []
        lines += [f'treadle_responses_total{{status="{name}"}} {count}' for name, count in statuses.items()]
        for name in sorted(self.counts.keys() - statuses):
            lines += _described(f"treadle_{name}_total", f"Clients that {name.replace('_', ' ')} so far.", "counter")
            lines.append(f"treadle_{name}_total {self.counts[name]}")
        return "\n".join(lines) + "\n"


def _described(name: str, meaning: str, kind: str) -> list[str]:
    return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]


class _Gone(Exception):
    """The client hung up before it had sent its request."""


async def _beside(body: bytes, work: Callable[[], Asked]) -> Asked:
    return await asyncio.to_thread(work) if len(body) > IN_THREAD else work()
