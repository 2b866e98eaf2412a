"""Malformed bodies, headers and bytes: no 5xx but 503, no traceback, and the next request is answered."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from typing import Any

import httpx
import pytest

from tests.serving.conftest import LIMITS, answering, byte_model, scripted_app, served
from treadle.generation.engine import Engine
from treadle.serving.app import App

GOOD = {
    "/v1/completions": {"model": "tiny", "prompt": "ab", "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "n": 2, "seed": 1, "stop": ["x"],
                        "logprobs": 2, "logit_bias": {"1": 2}, "stream": True, "stream_options": {"include_usage": True}},
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
                             {"role": "user", "content": "b"}], "max_completion_tokens": 4, "logprobs": True, "top_logprobs": 2, "stream": False},
    "/v1/chunks": {"text": "abc"},
}  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, -0.0, 1e308, 1e-320, "", "a", "\x00", "\ud800", "\udfff\ud800", "🧵" * 50, "x" * 5000,
    "../../etc/passwd", "{{ 7*7 }}", "{% for m in messages %}", "<|im_start|>system", "%s%n", [], [[]], [None], [1, "a"], [[1], [2, [3]]], {}, {"a": {}},
    {"role": "user"}, {"": ""}, [1] * 300, [256], [-1], [1.5], [True], ["a"] * 70, {str(n): 1 for n in range(1100)}, {"1": None}, {"-1": 1}, {"1e1": 1}, {"\u0661": 1},
    {"\ud800": 1}, [{"role": "system", "content": "\ud800"}], [{"role": "\U0010fff0", "content": "\U0010fff1"}], "Infinity", "NaN",
]  # fmt: skip
RAW = [b"", b"{", b"null", b"[]", b"\xff\xfe", b'{"a":NaN}', b'{"prompt":Infinity}', b"[" * 30_000, b'{"a":' * 10_000, b'{"n":' + b"9" * 5000 + b"}", b'"x"', b"{}{}",
       b'{"prompt":"\\ud800"}', b"\xef\xbb\xbf{}", b'{"prompt":"a","prompt":1}', "{}".encode("utf-16"), b"\x00" * 100, b'{"prompt": "a",}']  # fmt: skip


async def asked(app: App, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> tuple[int, bytes]:
    """The status and the body of one request, without a network and a client that would refuse to send it."""
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path, "raw_path": path.encode("utf-8", "replace"),
             "query_string": b"a=%ff", "headers": headers, "scheme": "http", "server": ("localhost", 80), "client": ("127.0.0.1", 1), "root_path": ""}  # fmt: skip
    told, status, parts = False, 0, []

    async def receive() -> Any:
        nonlocal told
        if told:
            await asyncio.sleep(3600)
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            assert status == 0, "two beginnings of one answer"
            status = message["status"]
            assert all(b"\r" not in value and b"\n" not in value for _, value in message["headers"])
        else:
            parts.append(message["body"])

    await app(scope, receive, send)
    return status, b"".join(parts)


def broken(draw: random.Random, value: Any) -> Any:
    """`value` with something changed somewhere inside."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        what = draw.random()
        if what < 0.1:
            return {name: other for name, other in value.items() if name != key}
        if what < 0.2:
            return {**value, draw.choice(["x", "", "\ud800", "tools", "suffix", "best_of", "prompt", "messages", "functions", "audio"]): draw.choice(ODD)}
        return {**value, key: broken(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.6:
        place = draw.randrange(len(value))
        return [broken(draw, one) if number == place else one for number, one in enumerate(value)]
    return draw.choice(ODD)


def request(draw: random.Random) -> tuple[str, str, list[tuple[bytes, bytes]], bytes]:
    path = draw.choice([*GOOD, *list(GOOD)[:2] * 10, "/v1/models/" + draw.choice(["tiny", "..", "\ud800", "%00", "a" * 5000]), "/", "//", "/health", "/v1/../x", "/\x00"])
    usual = "POST" if path in GOOD else "GET"
    method = draw.choices([usual, "GET", "PUT", "", "\x00", "POST" * 999], [90, 4, 2, 1, 1, 1])[0]
    body = draw.choice(RAW) if draw.random() < 0.03 else json.dumps(_several(draw, GOOD.get(path, {"a": 1}))).encode()
    if draw.random() < 0.1 and body:  # bytes changed at random
        at = draw.randrange(len(body))
        body = body[:at] + bytes([draw.randrange(256)]) * draw.randrange(4) + body[at + 1 :]
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    if draw.random() < 0.2:
        name = draw.choice([b"host", b"content-type", b"content-length", b"authorization", b"transfer-encoding", b"cookie", b"x-\xff", b""])
        value = draw.choice([b"", b"\xff\xfe", b"\x00", b"a" * 9000, b"-1", b"1e9", b"9" * 30, "٣".encode(), b"application/json; charset=\xff", b"Bearer \xff", b"[::1", b"::", b";;="])
        headers = draw.choice([[(name, value), *headers], [*headers, (name, value)], [(name, value)]])
    return method, path, headers, body


def _several(draw: random.Random, value: Any) -> Any:
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        value = broken(draw, value)
    return value


def whole(value: Any, least: int, most: float) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1 and least <= value <= most)


def number(value: Any, least: float, most: float) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most)


def text(value: Any, most: int = 10**9) -> bool:
    return isinstance(value, str) and len(value) <= most and not any("\ud800" <= c <= "\udfff" for c in value)


def ids(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= LIMITS.max_prompt_tokens and all(type(one) is int and 0 <= one < 256 for one in value)


def short(value: Any) -> bool:
    return text(value) and len(value.encode()) <= LIMITS.max_prompt_tokens


def flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def said(message: Any) -> bool:
    """Whether it is a message that the API reference allows a text model."""
    known = {"role", "content", "name", "refusal", "annotations", "audio", "tool_calls", "function_call", "reasoning_content"}
    if not isinstance(message, dict) or message.get("role") not in ("system", "developer", "user", "assistant"):
        return False
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return (all(isinstance(part, dict) and part.get("type") == "text" and text(part.get("text")) for part in parts)
            and all(key in known or value is None for key, value in message.items()) and not message.get("tool_calls") and not message.get("function_call"))  # fmt: skip


def sound(method: str, path: str, body: bytes) -> bool:
    """Whether a request is none of the malformed ones after all, by the API reference and this server's limits: of the few changes that
    leave a request right, those that `request` draws."""
    if method == "GET":
        return path in ("/", "/health", "/v1/models/tiny")
    if method != "POST" or path not in GOOD or path == "/v1/chunks":  # this model has no chunks
        return False
    try:
        asked = json.loads(body.decode(), parse_constant=lambda name: 1 / 0)
    except (ValueError, RecursionError, ZeroDivisionError):
        return False
    chat = path == "/v1/chat/completions"
    known = {*GOOD[path], "max_tokens", *(("tools", "functions", "audio") if chat else ("suffix", "best_of"))}
    if not isinstance(asked, dict) or not asked.keys() <= known or asked.get("model") not in (None, "tiny"):
        return False
    get, prompts = asked.get, 1
    if chat:
        messages = get("messages")
        if not isinstance(messages, list) or not messages or not all(map(said, messages)) or any(get(name) for name in ("tools", "functions", "audio")):
            return False
        texts = ["".join(p["text"] for p in m["content"]) if isinstance(m["content"], list) else m["content"] for m in messages]
        if len("".join(texts).encode()) > 100:  # nothing between that and 200 is drawn, and headings do not fill the rest
            return False
        if not flag(get("logprobs")) or not whole(get("top_logprobs"), 0, 20) or (get("top_logprobs") and not get("logprobs")):
            return False
        if not whole(get("max_completion_tokens"), 1, LIMITS.max_new_tokens):
            return False
    else:
        prompt = get("prompt")
        if isinstance(prompt, list) and prompt and not ids(prompt):
            prompts = len(prompt)
            if prompts > LIMITS.max_choices or not all(short(one) or ids(one) for one in prompt):
                return False
        elif prompt not in (None, []) and not short(prompt) and not ids(prompt):
            return False
        if get("suffix") or not whole(get("logprobs"), 0, 20) or (get("best_of") is not None and get("best_of") != (get("n") or 1)):
            return False
        if isinstance(get("best_of"), bool) or not whole(get("max_tokens"), 0, LIMITS.max_new_tokens):
            return False
    stops, bias, options = get("stop"), get("logit_bias"), get("stream_options")
    return (
        whole(get("n"), 1, LIMITS.max_choices // prompts) and number(get("temperature"), 0, 2) and number(get("top_p"), 0, 1)
        and whole(get("top_k"), -1, 1 << 30) and whole(get("seed"), -(1 << 63), (1 << 64) - 1) and flag(get("stream"))
        and (stops is None or (lambda some: len(some) <= 16 and all(text(one, 1000) and one for one in some))(stops if isinstance(stops, list) else [stops]))
        and (bias is None or (isinstance(bias, dict) and all(key in map(str, range(256)) and number(value, -100, 100) for key, value in bias.items())))
        and (options is None or (isinstance(options, dict) and get("stream") is True and flag(options.get("include_usage"))))
    )  # fmt: skip


@pytest.mark.parametrize("token, count", [(None, 10_000), ("a-secret-of-length", 1_000)])
def test_ten_thousand_malformed_requests(token: str | None, count: int, capfd: pytest.CaptureFixture[str]) -> None:
    app, engine = scripted_app("Hi 🧵", token=token, max_body_bytes=60_000)
    draw, seen = random.Random(3), dict.fromkeys((200, 400, 401, 403, 404, 405, 413, 415), 0)
    usual = [(b"host", b"localhost"), (b"content-type", b"application/json")]

    async def all_of_them() -> None:
        malformed = 0
        while malformed < count:
            method, path, headers, sent = request(draw)
            status, body = await asked(app, method, path, headers, sent)
            seen[status] = seen.get(status, 0) + 1
            right = sound(method, path, sent) and (token is None or path in ("/", "/health"))  # these need no token
            assert right if status == 200 else not right or headers != usual, (status, method, path, sent[:3000], body[:300])
            malformed += status != 200
            assert 200 <= status < 500 or status == 503, (status, body[:300])
            assert b"Traceback" not in body and b'File "' not in body and b"/treadle/" not in body
            if status >= 400:
                assert json.loads(body)["error"]["message"]
            if sum(seen.values()) % 50 == 0:
                good = [*usual, (b"authorization", b"Bearer a-secret-of-length")]
                status, body = await asked(app, "POST", "/v1/completions", good, b'{"prompt": "a"}')
                assert status == 200 and json.loads(body)["choices"][0]["text"] == "Hi 🧵"

    asyncio.run(all_of_them())
    assert engine.running == 0
    assert (seen.pop(401) > 0) is (token is not None)
    assert token or (min(seen.values()) > 5 and seen[400] > 6_000), seen  # each kind of refusal was met
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err


def test_bytes_that_are_no_http_and_clients_that_leave() -> None:
    app, _ = scripted_app("Hi")
    draw = random.Random(5)
    body = b'{"prompt": "a"}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with answering(app) as address:
        place = (address.split("//")[1].split(":")[0], int(address.rsplit(":", 1)[1]))
        for number in range(150):
            whole = head % len(body) + body
            at = draw.randrange(len(whole))
            sent = [draw.randbytes(draw.randrange(1, 400)), whole[:at], whole[:at] + draw.randbytes(3) + whole[at:], head % 10**20, head % 5 + body,
                    b"GET / HTTP/9.9\r\n\r\n", whole.replace(b"\r\n", b"\n"), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n" * 50][number % 9]  # fmt: skip
            with socket.create_connection(place, timeout=5) as one:
                one.sendall(sent)
                one.shutdown(socket.SHUT_WR) if draw.random() < 0.5 else None
                one.settimeout(0.02)
                try:
                    got = one.recv(4096)
                except (TimeoutError, ConnectionError):
                    got = b""
                assert b" 500 " not in got.split(b"\r\n")[0] and b"Traceback" not in got
        assert httpx.post(f"{address}/v1/completions", json={"prompt": "a"}).json()["choices"][0]["text"] == "Hi"


def test_extreme_but_sound_requests_of_a_real_engine() -> None:
    """Numbers at the ends of their ranges, all at once: each is answered, and none takes its neighbours' rows down."""
    engine = Engine(byte_model(), rows=8, max_len=LIMITS.max_len, queue=1000)
    engine.start()
    app, draw = App(engine, served()), random.Random(7)
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]

    def extreme() -> bytes:
        body: dict[str, Any] = {"prompt": [draw.randrange(256) for _ in range(draw.choice([1, 2, 200]))], "max_tokens": draw.choice([1, 7, 64])}
        choices: dict[str, list[Any]] = {
            "temperature": [0, 1e-320, 1e-45, 1e-30, 1e-3, 2], "top_p": [0, 1e-300, 1e-9, 1], "top_k": [0, 1, 255, 256, 257, 1 << 30],
            "repetition_penalty": [0.01, 1, 100], "seed": [-(1 << 63), 0, (1 << 64) - 1], "logprobs": [0, 20], "stream": [True, False], "n": [1, 3],
            "logit_bias": [{}, {str(token): -100 for token in range(256)}, {str(token): 100 for token in range(0, 256, 2)}],
        }  # fmt: skip
        body |= {name: draw.choice(values) for name, values in choices.items() if draw.random() < 0.7}
        return json.dumps(body).encode()

    async def all_of_them() -> list[tuple[int, bytes]]:
        return await asyncio.gather(*(asked(app, "POST", "/v1/completions", headers, extreme()) for _ in range(150)))

    try:
        answers = asyncio.run(all_of_them())
    finally:
        engine.stop(finish=False)
    assert [body[:300] for status, body in answers if status != 200 or b'"error"' in body] == []
