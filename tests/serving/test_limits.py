"""Who may ask, how much, and what a server says when it is full."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import pytest

from tests.serving.conftest import answering, client, scripted_app
from tests.serving.test_protocol import ask
from treadle.errors import ConfigError
from treadle.serving.limits import Limits, checked_host, is_local
from treadle.serving.sockets import listening, read_token

TOKEN = "a-secret-of-length"
BODY = {"prompt": "x", "max_tokens": 4}


def test_with_a_token_only_with_it() -> None:
    app, engine = scripted_app(token=TOKEN)
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}, {"authorization": TOKEN},
                    {"authorization": f"Bearer {TOKEN}x"}, {"authorization": "Bearer \u00e4"}):  # fmt: skip
        sent = {name: value.encode("latin-1").decode("latin-1") for name, value in headers.items() if value.isascii()}
        for path, body in (("/v1/completions", BODY), ("/v1/models", None), ("/metrics", None), ("/nothing", None)):
            status, answer, got = ask(app, path, body, **sent)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key" and got["www-authenticate"] == "Bearer"
    assert engine.requests == []
    assert ask(app, "/v1/completions", BODY, authorization=f"Bearer {TOKEN}")[0] == 200
    assert ask(app, "/v1/completions", BODY, authorization=f"bearer {TOKEN}", host="treadle.example")[0] == 200
    assert ask(app, "/health")[0] == 200 and ask(app, "/")[0] == 200


def test_without_a_token_another_name_for_this_machine_is_refused() -> None:
    """A page whose name its owner lets point to this machine is no part of it (DNS rebinding)."""
    app, _ = scripted_app()
    for host in ("localhost", "127.0.0.1:8000", "[::1]:80", "page.localhost"):
        assert ask(app, "/v1/models", host=host)[0] == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1:8000", "[::2]"):
        assert ask(app, "/v1/models", host=host)[0] == 403


def test_other_hosts_need_a_token() -> None:
    assert checked_host("0.0.0.0", TOKEN) == "0.0.0.0" and checked_host("::1", None) == "::1"
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        assert not is_local(host)
        with pytest.raises(ConfigError, match="TREADLE_TOKEN"):
            checked_host(host, None)


def test_a_token_comes_from_one_place_and_is_no_word(tmp_path: Any) -> None:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\nnotes\n")
    assert read_token(None, str(path)) == TOKEN and read_token(None, None) is None
    for token, file in (("short", None), (TOKEN, str(path)), ("has spaces in it", None), (None, str(tmp_path / "none"))):
        with pytest.raises(Exception, match="token"):
            read_token(token, file)


def test_a_taken_port_is_said(tmp_path: Any) -> None:
    first = listening("127.0.0.1", 0)
    with pytest.raises(ConfigError, match="--port"):
        listening("127.0.0.1", first.getsockname()[1])
    first.close()
    with pytest.raises(ConfigError, match="no address"):
        listening("no such host.invalid", 80)


def test_a_full_queue_says_when_to_come_back_and_frees_what_it_took() -> None:
    app, engine = scripted_app()
    engine.room = 3
    engine.hold.clear()
    status, answer, headers = ask(app, "/v1/completions", {**BODY, "n": 4})
    assert status == 429 and headers["retry-after"] == "3" and answer["error"]["type"] == "rate_limit_error"
    assert len(engine.cancelled) == 3  # one request is answered whole, or takes no room
    engine.hold.set()


def test_bodies_have_a_limit_with_and_without_a_length() -> None:
    app, _ = scripted_app(max_body_bytes=2000)
    assert ask(app, "/v1/completions", {"prompt": "x" * 3000})[0] == 413

    async def parts() -> Any:
        for _ in range(5):
            yield b" " * 1000

    async def chunked() -> int:
        async with client(app) as http:
            return (await http.post("/v1/completions", content=parts(), headers={"content-type": "application/json"})).status_code

    assert asyncio.run(chunked()) == 413


def test_a_body_that_does_not_arrive_is_not_waited_for() -> None:
    app, _ = scripted_app(body_seconds=0.05)

    async def slowly() -> Any:
        yield b"{"
        await asyncio.sleep(5)

    async def asking() -> int:
        async with client(app) as http:
            return (await http.post("/v1/completions", content=slowly(), headers={"content-type": "application/json"})).status_code

    assert asyncio.run(asking()) == 408


def test_other_kinds_of_bodies_and_methods_are_refused() -> None:
    app, engine = scripted_app()

    async def asking() -> list[int]:
        async with client(app) as http:
            return [(await http.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": "text/plain"})).status_code,
                    (await http.get("/v1/completions")).status_code, (await http.post("/v1/models", json={})).status_code,
                    (await http.request("HEAD", "/health")).status_code, (await http.get("/%2e%2e/%2e%2e/etc/passwd")).status_code,
                    (await http.options("/v1/completions")).status_code]  # fmt: skip

    assert asyncio.run(asking()) == [415, 405, 405, 200, 404, 405]
    assert engine.requests == []


@pytest.mark.parametrize("longest, prompt, new", [(None, 2048, 512), (4096, 2048, 512), (2560, 2048, 512), (1024, 512, 512), (64, 32, 32), (2, 1, 1)])
def test_limits_fit_the_positions_of_a_model(longest: int | None, prompt: int, new: int) -> None:
    limits = Limits().within(longest)
    assert (limits.max_prompt_tokens, limits.max_new_tokens) == (prompt, new)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_says_so_without_its_reasons(stream: bool) -> None:
    app, engine = scripted_app()
    engine.error = "error: CUDA out of memory in /secret/place"
    status, answer, _ = ask(app, "/v1/completions", {**BODY, "stream": stream})
    assert (status == 503) is not stream
    assert "secret" not in str(answer) and "server_error" in str(answer)
    engine.error = ""
    assert ask(app, "/v1/completions", BODY)[0] == 200


def test_a_server_that_ends_takes_nothing_new() -> None:
    app, _ = scripted_app()
    app.ending = True
    status, _, headers = ask(app, "/v1/completions", BODY)
    assert status == 503 and headers["retry-after"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_rows(stream: bool) -> None:
    app, engine = scripted_app("a" * 60)
    engine.pause = 0.05
    with answering(app) as address, httpx.Client(base_url=address) as http:
        with pytest.raises(httpx.ReadTimeout):
            if stream:
                with http.stream("POST", "/v1/completions", json={"prompt": "x", "max_tokens": 60, "stream": True, "n": 2}) as answer:
                    next(answer.iter_lines())
                    raise httpx.ReadTimeout("enough")
            http.post("/v1/completions", json={"prompt": "x", "max_tokens": 60, "n": 2}, timeout=0.3)
        http.close()
        waited = threading.Event()
        for _ in range(40):
            if len(engine.cancelled) == 2 and engine.running == 0:
                break
            waited.wait(0.05)
        assert len(engine.cancelled) == 2 and engine.running == 0
        assert app.counts["hung_up"] == 1


def test_a_client_that_reads_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from treadle.serving import delivery

    monkeypatch.setattr(delivery, "STALLED", 0.05)
    app, _ = scripted_app("a" * 60)
    told = 0

    async def asking() -> None:
        async def receive() -> Any:
            nonlocal told
            told += 1
            if told > 1:
                await asyncio.sleep(60)
            return {"type": "http.request", "body": b'{"prompt": "x", "stream": true}', "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.sleep(60)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
        async with asyncio.timeout(5):
            await app(scope, receive, send)

    asyncio.run(asking())
    assert app.counts["hung_up"] == 1


def test_a_prompt_too_long_for_its_limit_is_refused_before_it_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    app, _ = scripted_app()
    monkeypatch.setattr(type(app._served.tokenizer), "encode", None)
    status, answer, _ = ask(app, "/v1/completions", {"prompt": "x" * 201})
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded" and "--max-prompt-tokens" in answer["error"]["message"]
    assert ask(app, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 201}]})[0] == 400


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from treadle.serving.server import needed

    needed()
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"treadle\[serve\]"):
        needed()


def test_prompt_and_answer_together() -> None:
    from treadle.errors import ConfigError
    from treadle.serving.limits import longest

    assert longest(None, 512, None) == (2048, 512) and longest(100, 7, None) == (100, 7)
    assert longest(None, 512, 4096) == (3584, 512) and longest(None, 512, 64) == (32, 32)
    with pytest.raises(ConfigError, match="leave it or --max-prompt-tokens out"):
        longest(100, 512, 4096)
