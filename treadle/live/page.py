"""The page of a live run: its own markup, style and script around the pieces that it shares with reports."""

from __future__ import annotations

import functools
from importlib import resources

from treadle.reporting.pages import ICON, LOGO, piece
from treadle.serving.page import guards

SHARED = ("charts.js", "panels.js")


@functools.cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers. A browser runs its own script and style alone, and asks nobody but this server."""
    own = {name: resources.files("treadle.live").joinpath(f"live.{name}").read_text("utf-8") for name in ("html", "css", "js")}
    parts = {"icon": ICON, "logo": LOGO, "style": piece("page.css") + own["css"],
             "script": "\n".join([*(piece(name) for name in SHARED), own["js"]])}  # fmt: skip
    text = own["html"]
    for name, part in parts.items():
        text = text.replace("{{" + name + "}}", part, 1)
    return text.encode(), guards(text)
