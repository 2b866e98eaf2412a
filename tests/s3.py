"""An S3 server on this machine for tests, behind a proxy that can break what passes through it."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from unittest.mock import patch

import pytest

SECRET = "canary-5a1f-secret"
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "canary-key-id", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
HOP = {"transfer-encoding", "connection", "content-length"}


class Proxy(ThreadingHTTPServer):
    """Passes requests on to the server at `port`. faults: what happens to the next requests whose line holds `only`: "503", "cut"
    (half of the body, then the connection ends), "slow" (the body in drops), "lost" (404)."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind, self.only = port, ""
        self.faults: list[str] = []
        self.seen: list[str] = []  # request lines
        self.sent = 0  # bytes of bodies
        self.broken: list[str] = []

    def breaks(self, only: str, *faults: str) -> None:
        """The next requests with `only` in their line go wrong in these ways; counting begins anew."""
        self.only, self.faults, self.broken, self.seen, self.sent = only, list(faults), [], [], 0

    def fault(self, line: str) -> str:
        if self.faults and self.only in line:
            self.broken.append(line)
            return self.faults.pop(0)
        return ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *parts: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, ValueError):  # a request cut off in the middle
            super().handle()

    def _pass(self) -> None:
        line = f"{self.command} {self.path} {self.headers.get('Range', '')}".strip()
        self.server.seen.append(line)
        body = self._body()
        fault = self.server.fault(line)
        if fault in ("503", "lost"):
            self.send_response(503 if fault == "503" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        there = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=30)
        there.request(self.command, self.path, body, {k: v for k, v in self.headers.items() if k.lower() not in HOP and k.lower() != "expect"})
        answer = there.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in HOP:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        there.close()
        if self.command == "HEAD":
            return
        self.server.sent += len(data)
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        elif fault == "slow":
            for at in range(0, len(data), max(1, len(data) // 5)):
                self.wfile.write(data[at : at + max(1, len(data) // 5)])
                self.wfile.flush()
                time.sleep(0.1)
        else:
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0] or b"", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        wanted = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(wanted)
        if len(body) < wanted:  # whoever sent it was killed: a real server takes no part of an object
            raise ConnectionAbortedError
        return body

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass


@contextmanager
def s3_server(bucket: str = "bucket") -> Iterator[Proxy]:
    """The proxy before a server with one bucket; AWS_ENDPOINT_URL and credentials are in the environment meanwhile."""
    pytest.importorskip("s3fs", reason="the extra remote (s3fs) is not installed")
    moto = pytest.importorskip("moto.server", reason="moto, an S3 server, is not installed")
    import fsspec

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    proxy = Proxy(server.get_host_and_port()[1])
    Thread(target=proxy.serve_forever, daemon=True).start()
    with patch.dict(os.environ, {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_address[1]}"}):
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # of another test's server
        with contextlib.suppress(FileExistsError):  # moto keeps its buckets for the process
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir(f"s3://{bucket}")
        yield proxy
        proxy.shutdown()
        proxy.server_close()
        server.stop()
