"""The address that a server listens at, and the token it asks for. Imports nothing heavy."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from treadle.errors import ConfigError, InputError
from treadle.serving.limits import checked_host

SHORTEST_TOKEN = 8


def entrance(host: str, port: int, token: str | None, token_file: str | None) -> tuple[socket.socket, str, str | None]:
    """(the socket that listens, its address for a browser, the token that is asked for: the one given, or TREADLE_TOKEN's).
    ConfigError as `listening` and `read_token` raise, and for an address that others reach without a token."""
    secret = read_token(token, token_file) or read_token(os.environ.get("TREADLE_TOKEN") or None, None)
    checked_host(host, secret)
    listener = listening(host, port)
    return listener, f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}", secret


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
