"""A headless Chromium for the tests of pages, and a visit that writes down what a page asked for and what went wrong in it."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """The browser; the test is skipped where the machine has none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the playwright package is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        yield made
        made.close()


class Visit:
    """A tab at an address: what it asked for, and what went wrong in it. `how`: the arguments of Playwright's new_page."""

    COUNTED = frozenset({"error"})  # kinds of messages on the console that count as wrong

    def __init__(self, browser: Any, address: str, **how: Any) -> None:
        self.tab = browser.new_page(**how)
        self.asked: list[str] = []
        self.wrong: list[str] = []
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.tab.on("console", lambda message: self.wrong.append(message.text) if message.type in self.COUNTED else None)
        self.tab.goto(address)

    def ground(self) -> int:
        """Red, green and blue of the page's ground in one sum, 0 (black) to 765 (white)."""
        return sum(map(int, re.findall(r"\d+", self.tab.evaluate("getComputedStyle(document.body).backgroundColor"))))
