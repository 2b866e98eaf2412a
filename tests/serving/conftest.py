"""What tests of the server share: an engine that says what it is told to, a tiny byte model behind a real one, and both behind
a socket."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import torch

from treadle.errors import ConfigError
from treadle.generation.engine import Engine, QueueFull, Request, Token
from treadle.models.base import build_from
from treadle.models.catalogue import MODELS
from treadle.serving.app import App
from treadle.serving.limits import Limits
from treadle.serving.protocol import Served
from treadle.serving.sockets import listening
from treadle.text.base import Tokenizer
from treadle.text.byte import ByteTokenizer
from treadle.text.chat_template import ChatTemplate

LIMITS = Limits(max_prompt_tokens=200, max_new_tokens=64)


class Scripted:
    """The Engine's interface over a text that every request is answered with. `hold`: rows wait until it is set."""

    def __init__(self, text: str = "Hello, thread.", tokenizer: Tokenizer | None = None, room: int = 10_000) -> None:
        self.tokenizer, self.room = tokenizer or ByteTokenizer(), room
        self.ids = self.tokenizer.encode(text).tolist()
        self.hold = threading.Event()
        self.hold.set()
        self.requests: list[Request] = []
        self.cancelled: list[Ticket] = []
        self.running, self.error, self.pause = 0, "", 0.0

    def submit(self, request: Request) -> Ticket:
        if self.running >= self.room:
            raise QueueFull(self.running, 3.0)
        if len(request.prompt_ids) + request.max_new_tokens > 10_000:
            raise ConfigError("a row holds 10000")
        self.requests.append(request)
        self.running += 1
        ticket = Ticket(self, request)
        if self.hold.is_set() and not self.pause:
            ticket.write()
        else:
            threading.Thread(target=ticket.write, daemon=True).start()
        return ticket

    def stats(self) -> dict[str, Any]:
        return {"running": self.running, "waiting": 0, "state_bytes": 0, "tokens_per_second": 1.5}


class Ticket:
    def __init__(self, engine: Scripted, request: Request) -> None:
        self.engine, self.request, self.gone = engine, request, False

    def cancel(self) -> None:
        if not self.gone:
            self.gone = True
            self.engine.cancelled.append(self)

    def write(self) -> None:
        reason = "length"
        self.engine.hold.wait(30)
        for number, token in enumerate([*self.engine.ids, self.engine.tokenizer.eos_id]):
            time.sleep(self.engine.pause) if self.engine.pause else None
            if self.gone:
                reason = "cancelled"
                break
            if self.engine.error:
                reason = self.engine.error
                break
            if token in self.request.stop_ids:
                reason = "stop"
                break
            top = [(token, -0.5), ((token + 1) % 256, -1.5), (65, float("-inf"))][: self.request.logprobs or 0]
            if self.request.on_token(Token(token, -0.5, top)):
                reason = "stop"
                break
            if number + 1 == self.request.max_new_tokens:
                break
        self.gone = True
        self.engine.running -= 1
        self.request.on_end(reason)


def served(template: ChatTemplate | None = None, limits: Limits = LIMITS, tokenizer: Tokenizer | None = None) -> Served:
    tokenizer = tokenizer or ByteTokenizer()
    return Served("tiny", tokenizer, tokenizer.vocab_size, limits, template)


def scripted_app(text: str = "Hello, thread.", template: str | None = "plain", token: str | None = None, **limits: Any) -> tuple[App, Scripted]:
    engine = Scripted(text)
    of = ChatTemplate.named(template) if template is not None else None
    return App(engine, served(of, Limits(**{**vars(LIMITS), **limits})), token=token), engine


@contextlib.asynccontextmanager
async def client(app: App, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    """Asks the application itself, without a network."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost", headers=headers) as made:
        yield made


def byte_model(**shape: Any) -> Any:
    torch.manual_seed(1)
    cls = MODELS.get("transformer")
    return build_from(cls, cls.Config(vocab_size=256, **{"hidden_size": 32, "num_layers": 2, "num_heads": 2, "tie_embeddings": False, "initializer_range": 0.3, **shape})).eval()


def hierarchical() -> Any:
    torch.manual_seed(0)
    cls = MODELS.get("hnet")
    return build_from(cls, cls.Config(vocab_size=256, hidden_sizes=[24, 32], num_blocks=[[1, 0, 1], [1]], initializer_range=0.1)).eval()


@contextlib.contextmanager
def answering(app: App) -> Iterator[str]:
    """The address of the application behind a socket, in a thread of its own."""
    import uvicorn

    listener = listening("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none", timeout_keep_alive=60))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


@pytest.fixture(scope="module")
def real() -> Iterator[tuple[str, Engine, Any]]:
    """(address, engine, model) of a tiny byte model."""
    model = byte_model()
    engine = Engine(model, rows=8, max_len=LIMITS.max_len, queue=512)
    engine.start()
    app = App(engine, served(ChatTemplate.named("plain")))
    try:
        with answering(app) as address:
            yield address, engine, model
    finally:
        engine.stop(finish=False)
