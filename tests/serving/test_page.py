"""The page in a headless Chromium: it talks, shows probabilities and chunks, works with the keyboard, and asks nobody else."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Any

import pytest

from tests import browsers
from tests.serving.conftest import LIMITS, answering, hierarchical, scripted_app, served
from treadle.generation.engine import Engine
from treadle.serving.app import App
from treadle.serving.chunk_marks import ChunkMarks
from treadle.serving.page import page
from treadle.text.byte import ByteTokenizer

TEXT = "The wheel <b>turns</b> — naïve 🧵\nand on."


class Visit(browsers.Visit):
    def ready(self) -> Visit:
        self.tab.locator("#state", has_text="ready").wait_for(timeout=10_000)
        return self

    def say(self, text: str, answers: int) -> None:
        self.tab.keyboard.type(text)
        self.tab.keyboard.press("Enter")
        self.tab.locator(".note, .error").nth(answers - 1).wait_for(timeout=10_000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_conversation_by_the_keyboard_alone(browser: Any, scheme: str) -> None:
    app, engine = scripted_app(TEXT)
    with answering(app) as address:
        visit = Visit(browser, address, color_scheme=scheme).ready()
        tab = visit.tab
        visit.say("What does a treadle do?", 1)
        visit.say("Go on.", 2)
        assert tab.locator(".turn.model").all_text_contents() == [TEXT, TEXT]  # markup of a model stays text
        assert tab.locator(".turn.user").all_text_contents() == ["What does a treadle do?", "Go on."]
        assert tab.locator(".turn.model b").count() == 0
        assert bytes(engine.requests[1].prompt_ids).decode("utf-8", "replace").count(TEXT) == 1  # the second turn reads the first
        tab.keyboard.press("Shift+Tab")
        for _ in range(3):
            tab.keyboard.press("ArrowRight")
        assert tab.locator(".at").text_content() == "e"
        assert "e: 60.7%, the likeliest" in tab.locator("#about").text_content()  # exp(-0.5)
        assert [row.split()[0][0] for row in tab.locator("#alternatives li").all_text_contents()] == ["e", "f", "A"]
        tab.keyboard.press("End")
        assert tab.locator(".at").text_content() == "."
        tab.hover(".t >> nth=0")
        assert tab.locator(".at").text_content() == "T"
        assert float(tab.locator(".t").first.evaluate("one => one.style.getPropertyValue('--surprise')")) == pytest.approx(0.5 / 6, abs=1e-3)
        assert (visit.ground() < 200) is (scheme == "dark")
        assert visit.wrong == [] and all(url.startswith((address, "data:")) for url in visit.asked)
        tab.close()


def test_the_page_begins_with_the_models_own_settings(browser: Any) -> None:
    app, _ = scripted_app(TEXT)
    app._served = replace(app._served, defaults={"temperature": 0.3, "top_k": 7})
    with answering(app) as address:
        visit = Visit(browser, address).ready()
        assert [visit.tab.locator(f"#{name}").input_value() for name in ("temperature", "top_p", "top_k")] == ["0.3", "0.9", "7"]
        visit.tab.close()


def test_escape_stops_an_answer_and_the_next_is_whole(browser: Any) -> None:
    app, engine = scripted_app(TEXT)
    engine.pause = 0.1
    with answering(app) as address:
        visit = Visit(browser, address).ready()
        visit.tab.keyboard.type("x")
        visit.tab.keyboard.press("Enter")
        visit.tab.locator(".t").nth(2).wait_for()
        visit.tab.keyboard.press("Escape")
        visit.tab.locator(".note", has_text="stopped").wait_for()
        engine.pause = 0.0
        visit.say("y", 2)
        assert visit.tab.locator(".turn.model").nth(1).text_content() == TEXT
        deadline = time.monotonic() + 20  # the server hears of the one that left when its loop comes to it
        while not engine.cancelled and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(engine.cancelled) == 1
        visit.tab.close()


def test_a_base_model_continues_text_and_errors_are_shown(browser: Any) -> None:
    app, engine = scripted_app(" and on", template=None)
    with answering(app) as address:
        visit = Visit(browser, address).ready()
        visit.say("The wheel turns", 1)
        assert visit.tab.locator(".turn.text").text_content() == "The wheel turns and on" and visit.tab.locator("#modes").is_hidden()
        engine.room = 0
        visit.say("x", 2)
        assert "again in 3 seconds" in visit.tab.locator(".error").text_content()
        visit.tab.close()


def test_a_locked_server_asks_for_its_token(browser: Any) -> None:
    app, _ = scripted_app("Hi", token="a-secret-of-length")
    with answering(app) as address:
        visit = Visit(browser, address)
        visit.tab.locator("#token").wait_for()
        visit.tab.keyboard.type("a-secret-of-length")
        visit.tab.keyboard.press("Enter")
        visit.ready()
        visit.tab.focus("#said")
        visit.say("x", 1)
        assert visit.tab.locator(".turn.model").text_content() == "Hi" and visit.tab.locator("#locked").is_hidden()
        visit.tab.close()


def test_chunks_of_a_hierarchical_model(browser: Any) -> None:
    model = hierarchical()
    engine = Engine(model, rows=2, max_len=LIMITS.max_len)
    engine.start()
    try:
        app = App(engine, served(), marks=ChunkMarks.of_model(model, ByteTokenizer()))
        with answering(app) as address:
            visit = Visit(browser, address).ready()
            visit.tab.fill("#max_tokens", "20")
            visit.tab.focus("#said")
            visit.say("The wheel", 1)
            visit.tab.select_option("#stage", "0")
            text = visit.tab.locator(".turn.text").text_content()
            marks = ChunkMarks(model, ByteTokenizer()).of(text, 200)[0]
            visit.tab.locator(".chunked .starts").first.wait_for()
            painted = visit.tab.locator(".turn.text").evaluate(
                "turn => { let at = 0; const found = []; for (const one of turn.querySelectorAll('.g, .t'))"
                " { if (one.classList.contains('starts')) found.push(at); at += [...one.textContent].length; } return found; }")  # fmt: skip
            assert painted == [mark for mark in marks if mark < len(text)] and len(painted) > 1
            visit.tab.close()
    finally:
        engine.stop(finish=False)


def test_the_page_is_one_file_that_may_run_nothing_else() -> None:
    body, headers = page()
    text = body.decode()
    assert not re.search(r'(?:src|href)="(?!#|data:)', text) and "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert " on" + "click=" not in text and "style=" not in text and "innerHTML" not in text
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("sha256-") == 2
