"""The same page behind `treadle serve`: at /run, with the server's own token and limits."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.live.conftest import RunFolder
from tests.live.test_desk import training
from tests.serving.conftest import Scripted, client, served
from treadle.live.desk import Desk
from treadle.live.watched import Watched
from treadle.serving.app import App

SECRET = "long-enough-secret"


def app_of(run: RunFolder, token: str | None = None) -> App:
    return App(Scripted(), served(), token=token, live=Desk(Watched(run.folder), token))


@pytest.fixture()
def run(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.steps(1, 4)
    return made


def test_page_data_and_words(run: RunFolder) -> None:
    async def visit() -> None:
        async with client(app_of(run)) as web:
            page = await web.get("/run")
            assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
            assert page.headers.get_list("cache-control") == ["no-store"]
            data = (await web.get("/run/data")).json()
            assert data["runs"][0]["steps"] == [1, 2, 3, 4]
            again = (await web.get("/run/data", params={"since": data["cursor"]})).json()
            assert again["runs"] == []
            assert (await web.get("/v1/models")).json()["data"][0]["run"] is True
            answer = await web.post("/run/say", json={"run": 0, "line": "save"})
            assert (answer.status_code, answer.json()) == (200, {"answer": "heard save"})
            assert (await web.post("/run/say", json={"line": "save"}, headers={"origin": "http://evil.example"})).status_code == 403
            assert (await web.post("/run/say", content=b'{"line": "save"}', headers={"content-type": "text/plain"})).status_code == 415
            assert (await web.get("/run/data", headers={"host": "evil.example"})).status_code == 403
            for method, path, status in (("DELETE", "/run", 405), ("GET", "/run/say", 405), ("POST", "/run/data", 415), ("GET", "/run/../etc", 404), ("GET", "/running", 404)):
                assert (await web.request(method, path)).status_code == status, path

    with training(run.folder) as heard:
        asyncio.run(visit())
    assert heard == ["save"]


def test_the_servers_token(run: RunFolder) -> None:
    async def visit() -> None:
        app = app_of(run, SECRET)
        async with client(app) as web:
            assert (await web.get("/run")).status_code == 200
            assert (await web.get("/run/data")).status_code == 401
            assert (await web.post("/run/say", json={"line": "stop"})).status_code == 401
        async with client(app, authorization=f"Bearer {SECRET}") as web:
            assert (await web.get("/run/data")).status_code == 200

    asyncio.run(visit())


def test_a_model_that_is_no_run_has_no_such_page() -> None:
    async def visit() -> None:
        async with client(App(Scripted(), served())) as web:
            assert (await web.get("/run")).status_code == 404
            assert (await web.get("/v1/models")).json()["data"][0]["run"] is False

    asyncio.run(visit())


def test_odd_addresses(run: RunFolder) -> None:
    async def visit() -> None:
        app = app_of(run)
        for path, query in (("/run/data", b"since=%ff%00"), ("/run/data", b"\xff\xfe"), ("/run/data", b"&".join([b"since=1"] * 3000)), ("/run/\udcff", b""), ("/run/data", b"since"), ("/run//x[", b"")):
            status = []

            async def send(message: Any, status: list[int] = status) -> None:
                status += [message["status"]] if message["type"] == "http.response.start" else []

            async def receive() -> Any:
                return {"type": "http.request", "body": b"", "more_body": False}

            await app({"type": "http", "http_version": "1.1", "method": "GET", "path": path, "raw_path": b"/", "query_string": query,
                       "headers": [(b"host", b"localhost")], "scheme": "http", "server": ("localhost", 80), "client": ("127.0.0.1", 1), "root_path": ""}, receive, send)  # fmt: skip
            assert status and status[0] < 500, (path, query, json.dumps(status))

    asyncio.run(visit())
