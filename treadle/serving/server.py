"""A model behind an address: sockets, signals, and an end that finishes what runs."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treadle.errors import ConfigError, InputError, MissingExtra
from treadle.serving.app import App

KEEP_ALIVE = 5  # seconds that a connection without a request stays open
SHORTEST_TOKEN = 8


def needed() -> None:
    """MissingExtra where a package of the server is not installed."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise MissingExtra("treadle serve", "serve") from None


def listening(host: str, port: int) -> socket.socket:
    """A socket that connections queue up at. ConfigError where the address is taken or is none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as problem:
        raise ConfigError(f"--host {host} --port {port} is no address of this machine: {problem}") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(2048)
    except (OSError, OverflowError) as problem:
        made.close()
        raise ConfigError(f"{host}:{port} cannot be served at: {problem}; choose another with --port (0: any free one)") from None
    made.setblocking(False)
    return made


def read_token(token: str | None, token_file: str | None) -> str | None:
    """The token that was given, or the first line of a file. ConfigError for one that is too short to be secret."""
    if token is not None and token_file is not None:
        raise ConfigError("--token and --token-file exclude one another; keep one")
    if token_file is not None:
        try:
            token = (Path(token_file).read_text("utf-8").splitlines() or [""])[0].strip()
        except (OSError, ValueError) as problem:
            raise InputError(f"{token_file} cannot be read: {problem}; --token-file is a text file with the token in its first line") from None
    if token is not None and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token):
        raise ConfigError(f"a token has at least {SHORTEST_TOKEN} printable ASCII characters without spaces; make one with "
                          "python -c 'import secrets; print(secrets.token_urlsafe(24))'")  # fmt: skip
    return token


def serve(app: App, listener: socket.socket) -> int:
    """Answers until SIGTERM or Ctrl-C, then finishes what runs; a second signal leaves it -> 143 or 130, the exit code."""
    import uvicorn

    class Server(uvicorn.Server):
        """Signals are heard below: uvicorn's own handling would end the process by the signal itself."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(app, log_level="critical", access_log=False, server_header=False, lifespan="off", ws="none",
                            timeout_keep_alive=KEEP_ALIVE, backlog=2048)  # fmt: skip
    server: Any = Server(config)
    heard: list[int] = []

    def hear(number: int) -> None:
        server.force_exit = bool(heard)
        heard.append(number)
        app.ending = True
        server.should_exit = True

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # outside the main thread
                loop.add_signal_handler(number, hear, number)
        await server.serve(sockets=[listener])

    asyncio.run(run())
    return 128 + heard[0] if heard else 0
