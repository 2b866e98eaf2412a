"""What a request may ask of a server, and who may ask: sizes, hosts, the token; and errors in the shape of OpenAI's API."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from treadle.errors import ConfigError


class RequestError(Exception):
    """An answer that is an error: HTTP status, and what the error object of OpenAI's API holds."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """max_prompt_tokens, max_new_tokens: of one continuation. max_choices: continuations of one request. max_body_bytes: of a
    request's body. body_seconds: until a body has arrived."""

    max_prompt_tokens: int = 2048
    max_new_tokens: int = 512
    max_choices: int = 64
    max_body_bytes: int = 4 << 20
    body_seconds: float = 30.0

    def within(self, longest_row: int | None) -> Limits:
        """These limits for a model with positions for so many tokens: half of them at most are new ones. ConfigError for limits
        below 1."""
        if self.max_prompt_tokens < 1 or self.max_new_tokens < 1:
            raise ConfigError("--max-prompt-tokens and --max-new-tokens need a number >= 1")
        if longest_row is None or self.max_prompt_tokens + self.max_new_tokens <= longest_row:
            return self
        new = max(1, min(self.max_new_tokens, longest_row // 2))
        prompt = max(1, min(self.max_prompt_tokens, longest_row - new))
        return Limits(prompt, new, self.max_choices, self.max_body_bytes, self.body_seconds)

    @property
    def max_len(self) -> int:
        return self.max_prompt_tokens + self.max_new_tokens


def longest(prompt: int | None, new: int, together: int | None) -> tuple[int, int]:
    """(longest prompt, most new tokens) of what was said: `together` bounds both, half of it at most new ones. ConfigError where it is
    said beside a longest prompt."""
    if together is None:
        return Limits.max_prompt_tokens if prompt is None else prompt, new
    if prompt is not None:
        raise ConfigError("--max-model-len is prompt and answer together; leave it or --max-prompt-tokens out")
    new = max(1, min(new, together // 2))
    return together - new, new


def is_local(host: str) -> bool:
    """Whether a name or an address is this machine's own."""
    name = host.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def checked_host(host: str, token: str | None) -> str:
    """ConfigError for an address that others reach where no token is asked for."""
    if not is_local(host) and token is None:
        raise ConfigError(f"--host {host} can be reached by others, so it needs a token: set TREADLE_TOKEN, or --token-file FILE; "
                          "leave --host out to serve this machine alone")  # fmt: skip
    return host


class Access:
    """Who may ask: with a token only those who send it, in constant time; without one only programs of this machine."""

    def __init__(self, token: str | None, *pages: str) -> None:
        self._token = token.encode() if token is not None else None
        self._open = ("/health", *pages)  # they hold nothing of a model or a run, and a browser cannot send a token with an address

    def check(self, headers: Mapping[str, str], path: str) -> None:
        """RequestError 401 without the right token, 403 for a page of somebody else's that a browser here was shown."""
        if self._token is None:
            # A name that its owner points to this machine makes a browser take this server for that page's own.
            if not is_local(_without_port(headers.get("host", "localhost"))):
                raise RequestError(403, "without a token this server answers under localhost only; start it with a token")
            return
        if path in self._open:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._token)
        if kind.lower() != "bearer" or not same:
            raise RequestError(401, "this server needs its token: Authorization: Bearer TOKEN (api_key of the openai client)",
                               code="invalid_api_key", WWW_Authenticate="Bearer")  # fmt: skip


def _without_port(host: str) -> str:
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
