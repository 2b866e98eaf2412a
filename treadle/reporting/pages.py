"""One HTML file out of the pieces in web/: style, scripts and data inside, so that it needs no server and asks no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any

from treadle.monitor.sinks import finite
from treadle.serving.page import ICON, LOGO, policy


def piece(name: str) -> str:
    """A file of web/."""
    return resources.files("treadle.reporting").joinpath("web").joinpath(name).read_text("utf-8")


def page(title: str, data: dict[str, Any], parts: Sequence[str]) -> str:
    """The whole page. parts: scripts of web/, run in this order as one; they find `data` with JSON.parse in #data, and build the
    page in #page."""
    script = "\n".join(piece(name) for name in parts)
    style = piece("page.css")
    assert "</" not in script and "<!--" not in script, "a script must not end itself"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy([script], [style]))}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{escape(title)}</title>
<link rel="icon" href="{ICON}">
<style>{style}</style>
</head>
<body>
<header class="top">{LOGO}<h1>{escape(title)}</h1></header>
<div id="page"><noscript><main><p>This page draws itself with a script, which is switched off here.</p></main></noscript></div>
<script type="application/json" id="data">{as_json(data)}</script>
<script>{script}</script>
</body>
</html>
"""


def as_json(data: Any) -> str:
    """JSON that can stand inside a script element: nothing in it, whatever a model or a person wrote, ends the element."""
    text = json.dumps(finite(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=str)
    # Lone surrogates have no UTF-8; U+2028 and U+2029 end lines in old scripts.
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
