"""The one page of a server: a file of its own beside this one; and what every page of the project has: mark, icon, and what a
browser may do with it."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Sequence
from importlib import resources

LOGO = (
    '<svg class="logo" viewBox="0 0 32 32" aria-hidden="true"><circle cx="16" cy="16" r="12" fill="none" stroke="currentColor" '
    'stroke-width="3.5"/><path d="M16 4v24M4 16h24M7.5 7.5l17 17M24.5 7.5l-17 17" stroke="currentColor" stroke-width="1.6"/></svg>'
)
ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'%3E%3Ccircle cx='16' cy='16' r='12' fill='none' "
    "stroke='%23b4552d' stroke-width='4'/%3E%3Cpath d='M16 4v24M4 16h24' stroke='%23b4552d' stroke-width='2'/%3E%3C/svg%3E"
)


@functools.cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers. A browser runs its own script and style alone, and asks nobody but this server."""
    return served(resources.files("treadle.serving").joinpath("page.html").read_text("utf-8"))


def served(text: str, **parts: str) -> tuple[bytes, dict[str, str]]:
    """A page with {{icon}}, {{logo}} and its other parts filled in, and its headers: scripts and styles are all inside it, a
    browser runs these alone, and asks only its server."""
    for name, part in {"icon": ICON, "logo": LOGO, **parts}.items():
        text = text.replace("{{" + name + "}}", part, 1)
    scripts, styles = (re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.S) for tag in ("script", "style"))
    allowed = f"{policy(scripts, styles)}; connect-src 'self'; frame-ancestors 'none'"
    return text.encode(), {"Content-Security-Policy": allowed, "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}


def policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    """What a browser may do with a page: run these scripts and these styles, nothing else."""
    return (f"default-src 'none'; script-src {_hashes(scripts)}; style-src {_hashes(styles)}; img-src data:; base-uri 'none'; "
            "form-action 'none'")  # fmt: skip


def _hashes(parts: Sequence[str]) -> str:
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts)
