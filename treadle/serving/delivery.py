"""From a request's body to its answer: hands the continuations to the engine, and frees them when the client is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from treadle.errors import ConfigError
from treadle.generation.engine import EngineStopped, QueueFull, Request
from treadle.serving.answers import Channel, Choice, Piece, Shapes
from treadle.serving.limits import RequestError
from treadle.serving.protocol import Asked, Served
from treadle.serving.token_names import TokenNames

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
STALLED = 60.0  # seconds that a client may leave what is sent to it unread
QUIET = 15.0  # seconds after which a stream that waits for its turn says so: proxies close what is silent for 30 to 60


class Cancels(Protocol):
    def cancel(self) -> None: ...


class Works(Protocol):
    """What a server needs of generation/engine.py's Engine."""

    def submit(self, request: Request) -> Cancels: ...

    def stats(self) -> dict[str, Any]: ...


def as_json(table: Any) -> bytes:
    """ASCII, so that no text of a request or a model can be no UTF-8."""
    return json.dumps(table, separators=(",", ":"), allow_nan=False).encode("ascii")


class Answer:
    """The answer to one request, an ASGI application. Its continuations are submitted when it is made: RequestError 429, 400 or 503
    says before the first byte that they are not."""

    def __init__(self, engine: Works, served: Served, names: TokenNames, fingerprint: str, asked: Asked) -> None:
        self._asked, self._channel = asked, Channel()
        self._shapes = Shapes(asked, served.name, fingerprint, names)
        self._choices: list[Choice] = []
        self._tickets: list[Cancels] = []
        self.hung_up = False
        try:
            for number, prompt in enumerate(asked.prompts):
                for copy in range(asked.n):
                    echo = asked.echoes[number] if asked.echoes is not None else ""
                    self._begin(engine, served, prompt, copy, echo)
        except RequestError:
            self._cancel()
            raise

    def _begin(self, engine: Works, served: Served, prompt: list[int], copy: int, echo: str) -> None:
        asked, index = self._asked, len(self._choices)
        choice = Choice(asked, served.tokenizer, prompt, index, self._channel, echo)
        self._choices.append(choice)
        if asked.max_new_tokens == 0:  # the prompt repeated, and nothing more
            choice.on_end("length")
            return
        request = Request(prompt, asked.max_new_tokens, asked.sampling, (asked.seed + copy) % (1 << 63), asked.stop_ids, asked.logprobs,
                          asked.logit_bias, choice.on_token, choice.on_end)  # fmt: skip
        try:
            self._tickets.append(engine.submit(request))
        except QueueFull as full:
            seconds = max(1, round(full.retry_after))
            raise RequestError(429, f"{full}", code="queue_full", Retry_After=str(seconds)) from None
        except EngineStopped:
            raise RequestError(503, "the server is ending; it takes no new requests", code="stopping", Retry_After="10",
                               Connection="close") from None  # fmt: skip
        except ConfigError as problem:
            raise RequestError(400, str(problem)) from None

    def _cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_hung_up(receive))
        try:
            await (self._stream(send, gone) if self._asked.stream else self._whole(send, gone))
        except OSError:  # what a server raises that sends to nobody, and the timeout of one who does not read
            self.hung_up = True
        finally:
            gone.cancel()
            self._cancel()  # those that have ended stay as they are

    async def _pieces(self, gone: asyncio.Task[None]) -> list[Piece] | None:
        """The pieces that are there; none of them after QUIET seconds, None when the client is gone."""
        taking = asyncio.create_task(self._channel.take())
        try:
            await asyncio.wait({taking, gone}, timeout=QUIET, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                self.hung_up = True
                return None
            return taking.result() if taking.done() else []
        finally:
            taking.cancel()

    async def _whole(self, send: Send, gone: asyncio.Task[None]) -> None:
        found: list[Piece] = []
        while len(found) < len(self._choices):
            pieces = await self._pieces(gone)
            if pieces is None:
                return
            found += pieces
            failed = next((piece for piece in pieces if _failed(piece.reason)), None)
            if failed is not None:
                await respond(send, 503, as_json(failure(failed.reason).body()))
                return
        await respond(send, 200, as_json(self._shapes.answer(found, [choice.count for choice in self._choices])))

    async def _stream(self, send: Send, gone: asyncio.Task[None]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [
            (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no"),
            (b"x-content-type-options", b"nosniff")]})  # fmt: skip
        if self._asked.chat:
            await _part(send, b"".join(_event(self._shapes.first(choice.index)) for choice in self._choices))
        left = len(self._choices)
        while left:
            pieces = await self._pieces(gone)
            if pieces is None:
                return
            failed = next((piece for piece in pieces if _failed(piece.reason)), None)
            if failed is not None:
                await _part(send, _event(failure(failed.reason).body()) + b"data: [DONE]\n\n", more=False)
                return
            left -= sum(piece.reason is not None for piece in pieces)
            out = b"".join(_event(chunk) for piece in pieces for chunk in self._shapes.chunks(piece))
            await _part(send, out or b": waiting\n\n")
        end = _event(self._shapes.last([choice.count for choice in self._choices])) if self._asked.include_usage else b""
        await _part(send, end + b"data: [DONE]\n\n", more=False)


def _failed(reason: str | None) -> bool:
    return reason is not None and reason not in ("stop", "length")


def failure(reason: str | None) -> RequestError:
    """A continuation that the engine gave up. What went wrong inside is not the client's to read."""
    said = "the server is ending" if reason == "cancelled" else "the model could not go on with this request; try again"
    return RequestError(503, said, code="engine")


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(table: dict[str, Any]) -> bytes:
    return b"data: " + as_json(table) + b"\n\n"


async def _part(send: Send, body: bytes, more: bool = True) -> None:
    async with asyncio.timeout(STALLED):
        await send({"type": "http.response.body", "body": body, "more_body": more})


async def respond(send: Send, status: int, body: bytes, kind: bytes = b"application/json", headers: dict[str, str] | None = None) -> None:
    """A whole answer."""
    given = [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": [
        (b"content-type", kind), (b"content-length", str(len(body)).encode()), (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"), *given]})  # fmt: skip
    await _part(send, body, more=False)
