"""The one page of a server: a file of its own beside this one, and what a browser may do with it."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources


@functools.cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers. A browser runs its own script and style alone, and asks nobody but this server."""
    text = resources.files("treadle.serving").joinpath("page.html").read_text("utf-8")
    return text.encode(), guards(text)


def guards(text: str) -> dict[str, str]:
    """Headers for a page whose scripts and styles are all inside it: a browser runs these alone, and asks only its server."""
    own = {tag: " ".join(_hashes(text, tag)) for tag in ("script", "style")}
    policy = (f"default-src 'none'; script-src {own['script']}; style-src {own['style']}; connect-src 'self'; img-src data:; "
              "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")  # fmt: skip
    return {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}


def _hashes(text: str, tag: str) -> list[str]:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.S)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in found]
