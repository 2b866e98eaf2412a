"""The page of a live run behind a socket of this machine: the standard library's server, so that watching needs no extra."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from treadle import terminal
from treadle.live.desk import MAX_BODY_BYTES, PAGE, Desk, Reply, as_json
from treadle.serving.limits import RequestError

SILENT = 15.0  # seconds after which a connection that sends nothing is closed; the page asks every second
CONNECTIONS = 64  # at once, a thread each; a browser opens at most 6
VERB = "do_"


class Handler(BaseHTTPRequestHandler):
    """One connection. Reads a request whole, hands it to the desk, writes the answer."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "treadle", ""
    timeout = SILENT
    server: Server

    def __getattr__(self, name: str) -> Any:
        if name.startswith(VERB):  # every method has an answer: the standard library's own for an unknown one is 501
            return self._any
        raise AttributeError(name)

    def _any(self) -> None:
        if self.server.ending:
            self.close_connection = True
            return
        try:
            reply = self._reply()
        except RequestError as problem:
            self.close_connection = True
            reply = Reply(problem.status, as_json(problem.body()), headers=problem.headers)
        except OSError:  # the client left, or fell silent
            self.close_connection = True
            return
        except Exception:  # a defect: the operator reads where, the client that there is one
            terminal.write(traceback.format_exc(), sys.stderr, end="")
            reply = Reply(500, as_json(RequestError(500, "an error inside the server; its log says more").body()))
        self._write(reply)

    def _reply(self) -> Reply:
        if self.headers.get("Transfer-Encoding") is not None:
            raise RequestError(411, "send a Content-Length", Connection="close")
        length = (self.headers.get("Content-Length") or "0").strip()
        if not length.isascii() or not length.isdigit() or len(self.headers.get_all("Content-Length") or []) > 1:
            raise RequestError(400, "Content-Length is a number", Connection="close")
        if len(length) > 9 or int(length) > MAX_BODY_BYTES:
            raise RequestError(413, f"the body has more than {MAX_BODY_BYTES} bytes", Connection="close")
        body = self.rfile.read(int(length)) if int(length) else b""
        if len(body) < int(length):
            raise ConnectionResetError("the client left before it had sent its request")
        if self.command in ("GET", "HEAD") and self.path == "/":
            return Reply(307, b"", "text/plain", {"Location": PAGE})
        headers = {name.lower(): value for name, value in self.headers.items()}
        return self.server.desk.answer(self.command, self.path, headers, body)

    def _write(self, reply: Reply) -> None:
        try:
            self.send_response(reply.status)
            headers = {"Content-Type": reply.type, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", **reply.headers, "Content-Length": str(len(reply.body))}
            for name, value in headers.items():
                self.send_header(name, value)
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body)
        except OSError:
            self.close_connection = True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses before a handler runs; all of it is the client's doing."""
        self.close_connection = True
        if not hasattr(self, "command") or self.command is None:
            self.command = ""
        self.request_version = self.protocol_version
        status = 400 if code >= 500 else int(code)
        self._write(Reply(status, as_json(RequestError(status, message or "this is no request").body())))

    def log_message(self, *_: Any) -> None:
        """Says nothing: the page asks every second."""


class Server(ThreadingHTTPServer):
    """`listener`: a socket that listens already."""

    daemon_threads = True

    def __init__(self, listener: socket.socket, desk: Desk) -> None:
        listener.setblocking(True)
        super().__init__(listener.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.desk, self.ending = listener, desk, False
        self._room = threading.BoundedSemaphore(CONNECTIONS)

    def shutdown(self) -> None:
        """Ends the loop; connections that stay open are answered no more."""
        self.ending = True
        super().shutdown()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke; defects are written by the handler."""


def serve(desk: Desk, listener: socket.socket) -> int:
    """Answers until Ctrl-C or SIGTERM -> 130 or 143, the exit code."""
    heard: list[int] = []
    with Server(listener, desk) as server:

        def hear(number: int, _: Any) -> None:
            heard.append(number)
            threading.Thread(target=server.shutdown, daemon=True).start()  # waits for the loop, which this thread is in

        before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            server.serve_forever(poll_interval=0.2)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return 128 + heard[0] if heard else 0
