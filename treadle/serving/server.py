"""A model behind an address: sockets, signals, and an end that finishes what runs."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from typing import Any

from treadle.errors import MissingExtra
from treadle.serving.app import App

KEEP_ALIVE = 5  # seconds that a connection without a request stays open


def needed() -> None:
    """MissingExtra where a package of the server is not installed."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise MissingExtra("treadle serve", "serve") from None


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
