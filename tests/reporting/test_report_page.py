"""The report in a headless Chromium: light, dark, by the keyboard, on paper; nothing goes wrong in it and nobody is asked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests import browsers
from tests.reporting.conftest import ENDS_A_SCRIPT, write_run
from treadle.reporting.pages import page
from treadle.reporting.report import PARTS, Place, collected, write_report


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of one run whose text has been coloured already."""
    folder = write_run(tmp_path_factory.mktemp("one") / "run")
    data = collected([Place(folder, str(folder))], [], model=False)
    data["runs"][0]["text"] = [
        {"title": "Passage 1", "tokens": ["The", " wheel", ENDS_A_SCRIPT, "."], "losses": [None, 2.0, 9.0, 0.1], "chunks": [[0, 2]], "per_chunk": [2.0]},
        {"title": "Passage 2", "tokens": ["On"], "losses": [1.0]},
    ]
    target = folder / "report.html"
    target.write_text(page(data.pop("title"), data, PARTS), encoding="utf-8")
    return target


class Visit(browsers.Visit):
    """A tab at a file; warnings count too."""

    COUNTED = frozenset({"error", "warning"})

    def __init__(self, browser: Any, path: Path, scheme: str = "light", width: int = 1280) -> None:
        super().__init__(browser, path.as_uri(), color_scheme=scheme, viewport={"width": width, "height": 900})
        self.path = path

    def fine(self) -> None:
        assert self.wrong == [] and {url for url in self.asked if not url.startswith("data:")} == {self.path.as_uri()}
        self.tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_one_run(browser: Any, one: Path, scheme: str) -> None:
    visit = Visit(browser, one, scheme)
    tab = visit.tab
    titles = tab.locator("h2").all_text_contents()
    assert titles == ["Quality", "Training", "Inside the model", "Text by its loss", "Samples", "What the planner said, and what was", "Events",
                      "Settings and machine"]  # fmt: skip
    assert tab.title() == "one" and tab.locator(".badge").text_content() == "finished"
    assert tab.locator("figure.chart").count() == tab.locator("figure.chart path.line").evaluate_all("found => new Set(found.map(p => p.closest('figure'))).size")
    assert (visit.ground() < 200) is (scheme == "dark")
    tab.get_by_role("button", name="Light / dark").click()
    assert (visit.ground() < 200) is (scheme == "light")
    assert ENDS_A_SCRIPT in tab.locator(".prose").last.text_content() and tab.locator("script").count() == 2  # what a model wrote stays text
    visit.fine()


def test_curves_against_everything_and_by_the_keyboard(browser: Any, one: Path) -> None:
    visit = Visit(browser, one)
    tab, first = visit.tab, visit.tab.locator("figure.chart").first
    assert first.locator("strong").text_content() == "Bits per byte"  # what the run is ranked by comes first
    first.locator("svg").focus()
    tab.keyboard.press("End")
    said = first.locator(".readout").text_content()
    assert said.startswith("step 40") and "training" in said and "validation" in said
    tab.keyboard.press("ArrowLeft")
    assert first.locator(".where").text_content() == "step 39"
    tab.keyboard.press("Home")
    assert first.locator(".where").text_content() == "step 1" and first.locator("[role=status]").text_content().startswith("step 1: training 5.77")
    tab.keyboard.press("Escape")
    assert first.locator(".readout").is_hidden()
    shown = {"tokens": "tokens 10.2k", "bytes": "bytes 20.5k", "time": "time 10 s", "steps": "step 40"}  # 256 * 40, two bytes a token, 0.25 s a step
    for axis, where in shown.items():
        tab.get_by_role("button", name=axis, exact=True).click()
        first.locator("svg").focus()
        tab.keyboard.press("End")
        assert first.locator(".where").text_content() == where
    box = first.locator("svg").bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert abs(int(first.locator(".where").text_content().split()[1]) - 20) <= 2
    before = first.locator("path.line").first.get_attribute("d")
    tab.get_by_label("logarithmic").check()
    logarithmic = first.locator("path.line").first.get_attribute("d")
    assert logarithmic != before
    tab.get_by_label("Smoothing").focus()
    lines = first.locator("path.line").count()
    tab.keyboard.press("End")
    assert first.locator("path.line").count() == lines + 1  # the smoothed line beside what was logged
    first.get_by_role("button", name="validation").click()
    assert first.locator("circle.dot").count() == 0
    assert first.locator("line.mark.bad title").text_content().startswith("Rolled back at step 20: to step 10: loss was not finite")
    visit.fine()


def test_text_by_its_loss_and_chunks(browser: Any, one: Path) -> None:
    visit = Visit(browser, one)
    tab, prose = visit.tab, visit.tab.locator(".prose.shade")
    assert prose.locator(".t").evaluate_all("all => all.map(t => t.style.getPropertyValue('--surprise'))") == ["", "0.250", "1.000", "0.013"]
    assert prose.locator(".odd").all_text_contents() == ["The", " wheel"] and prose.locator(".starts").count() == 2
    prose.focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    about = tab.locator(".card.long output[role=status]")
    assert prose.locator(".at").text_content() == " wheel" and "2.00 nats, probability 13.5%" in about.text_content()  # exp(-2)
    tab.get_by_label("Chunks").select_option("")
    assert prose.locator(".starts").count() == 0
    tab.get_by_role("button", name="passage 2").click()
    assert tab.locator(".prose.shade").text_content() == "On"
    tab.get_by_label("Which sample").focus()
    tab.keyboard.press("Home")
    assert "said at 10" in tab.locator("pre.prose").text_content()
    visit.fine()


def test_several_runs(browser: Any, tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", name="slow")
    second = write_run(tmp_path / "b", name="fast", loss=2.0, learning_rate=3e-3)
    third = write_run(tmp_path / "c", name="third", status="diverged")
    target = tmp_path / "all.html"
    write_report([str(first), str(second), str(third)], target, model=False)
    visit = Visit(browser, target)
    tab = visit.tab
    assert tab.locator("h2").first.text_content() == "Comparison"
    table = tab.locator("section").first
    assert table.locator("tbody tr").all_text_contents()[1].startswith("fast") and table.locator("td.best").count() >= 1
    scroll = table.locator(".scroll")
    tab.set_viewport_size({"width": 600, "height": 900})
    assert scroll.evaluate("e => e.scrollWidth > e.clientWidth")  # columns are hidden: a shadow, beneath a cover that moves away
    assert scroll.evaluate("e => getComputedStyle(e).backgroundAttachment") == "local, scroll"
    tab.set_viewport_size({"width": 1280, "height": 900})
    table.get_by_role("button", name="best bits/byte").click()
    assert table.locator("tbody th").all_text_contents()[0] == "fast"
    changed = tab.locator("section", has=tab.get_by_role("heading", name="What differs")).locator("tbody tr")
    assert changed.all_text_contents() == ["optim.learning_rate0.0010.0030.001"]
    planner = tab.locator("section", has=tab.get_by_role("heading", name="What the planner said")).locator("thead th")
    assert [title.removesuffix("planned") for title in planner.all_text_contents()][:5] == ["run", "peak memory of a process, GB", "was", "seconds a step", "was"]
    chart = tab.locator("figure.chart").first
    lines = chart.locator("path.line").count()
    tab.get_by_role("group", name="Runs that are shown").get_by_role("button", name="slow").click()
    assert chart.locator("path.line").count() == lines - 2  # its training and its evaluations
    visit.fine()


def test_on_paper_and_on_a_narrow_screen(browser: Any, one: Path) -> None:
    visit = Visit(browser, one, width=380)
    assert visit.tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")
    visit.fine()
    visit = Visit(browser, one, "dark")
    paper = visit.tab.pdf(format="A4", print_background=True)
    assert paper.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", paper)) >= 2
    visit.tab.emulate_media(media="print", color_scheme="dark")
    assert visit.tab.locator("nav.bar").is_hidden() and visit.ground() == 3 * 255  # no ink for a dark ground
    visit.fine()
