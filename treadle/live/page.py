"""The page of a live run: its own markup, style and script around the pieces that it shares with reports."""

from __future__ import annotations

import functools
from importlib import resources

from treadle.reporting.pages import piece
from treadle.serving.page import served

SHARED = ("charts.js", "panels.js")


@functools.cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers. A browser runs its own script and style alone, and asks nobody but this server."""
    own = {name: resources.files("treadle.live").joinpath(f"live.{name}").read_text("utf-8") for name in ("html", "css", "js")}
    return served(own["html"], style=piece("page.css") + own["css"], script="\n".join([*(piece(name) for name in SHARED), own["js"]]))
