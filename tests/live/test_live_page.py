"""The page in a headless Chromium at a run that is really trained: curves grow, buttons reach the training, a stop saves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browsers import Visit
from tests.conftest import flags
from tests.live.conftest import RunFolder, behind_socket, suite
from tests.serving.conftest import Scripted, answering, served
from treadle.live.desk import Desk
from treadle.live.watched import Watched
from treadle.reporting.report import write_report
from treadle.serving.app import App
from treadle.training.config import SETTABLE

SOON = 20_000  # ms, on a loaded machine


class Tab(Visit):
    def state(self, text: str) -> None:
        self.tab.locator("#badge", has_text=re.compile(f"^{text}$")).wait_for(timeout=SOON)

    def answer(self, text: str) -> None:
        self.tab.locator("#answers", has_text=text).wait_for(timeout=SOON)


@pytest.fixture()
def training(tmp_path: Path, text_file: Path) -> Iterator[tuple[Path, Any]]:
    """A run of a tiny model that takes about a minute, in a process of its own."""
    run = tmp_path / "runs" / "tiny <b>run"
    arguments = ["train", text_file, *flags(max_steps=20_000, output_dir=run, eval_steps=100_000, save_steps=100_000)]
    process = subprocess.Popen([sys.executable, "-m", "treadle", *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    until = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    try:
        yield run, process
    finally:
        process.kill()
        process.wait()


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text("utf-8").splitlines()]


def test_a_training_is_followed_steered_and_stopped(browser: Any, training: tuple[Path, Any]) -> None:
    run, process = training
    with behind_socket(Desk(Watched(run))) as address:
        one, two = Tab(browser, address), Tab(browser, address, color_scheme="dark", viewport={"width": 390, "height": 800})
        one.state("training")
        tab = one.tab
        step = "() => Number(document.querySelector('#tiles .tile b').textContent.split(' ')[0])"
        before = tab.evaluate(step)
        path = tab.locator("#quality path.line").first.get_attribute("d")
        tab.wait_for_function(f"before => ({step})() > before", arg=before, timeout=SOON)
        tab.wait_for_function("before => document.querySelector('#quality path.line').getAttribute('d') !== before", arg=path, timeout=SOON)
        assert tab.title().startswith("0%") or "%" in tab.title()
        assert tab.locator("h1").text_content() == "tiny <b>run"

        tab.get_by_role("button", name="Save").click()
        one.answer("saving after step")
        tab.get_by_role("button", name="Evaluate").click()
        one.answer("evaluating after step")
        tab.locator("#value").fill("1e-4")
        tab.keyboard.press("Enter")
        one.answer("optim.learning_rate = 0.0001 from the next step on")
        tab.locator("#value").fill("much")
        tab.get_by_role("button", name="Set", exact=True).click()
        one.answer("should be a valid number")
        tab.locator("#quality .key", has_text="validation").first.wait_for(timeout=SOON)  # the evaluation that was asked for
        two.tab.locator("#happened", has_text="set optim.learning_rate=1e-4").wait_for(timeout=SOON)  # the other tab learns of it
        assert any(event["event"] == "saved" for event in events(run))

        tab.locator("#stop").click()
        tab.get_by_role("button", name="Keep training").click()
        assert process.poll() is None and not any(event.get("line") == "stop" for event in events(run))
        tab.locator("#stop").click()
        tab.locator("#sure").get_by_role("button", name="Stop").click()
        one.answer("stopping after step")
        for visit in (one, two):
            visit.state("stopped")
            visit.tab.locator("#ended", has_text="treadle report").wait_for(timeout=SOON)
        assert process.wait(30) == 75
        end = json.loads((run / "summary.json").read_text("utf-8"))
        assert end["status"] == "stopped" and (run / "checkpoints" / f"step-{end['step']:08d}").is_dir()
        assert tab.evaluate(step) == end["step"]
        assert tab.locator("#stop").is_disabled()
        two.tab.wait_for_timeout(300)
        assert two.tab.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out of a telephone
        assert one.wrong == [] and two.wrong == []
        assert all(url.startswith(address) or url.startswith("data:") for url in one.asked + two.asked)
        one.tab.close(), two.tab.close()


def test_the_page_recovers(browser: Any, tmp_path: Path) -> None:
    """A folder that goes away and comes back, a resume that takes rows back, a server that ends and starts again."""
    run = RunFolder(tmp_path / "run")
    run.steps(1, 3000)
    with behind_socket(Desk(Watched(run.folder))) as address:
        visit = Tab(browser, address)
        visit.state("training")
        last = "() => document.querySelector('#quality figure svg').getAttribute('aria-label')"
        run.folder.rename(tmp_path / "away")
        visit.state("gone")
        (tmp_path / "away").rename(run.folder)
        visit.state("training")
        run.resumed_at(5)
        visit.tab.wait_for_function(f"() => ({last})().includes('loss 1') || ({last})().includes('training 1')", timeout=SOON)  # 5 / 5
        port = int(address.rpartition(":")[2])
    visit.tab.locator("#lost:not([hidden])").wait_for(timeout=SOON)
    assert "treadle watch" in visit.tab.locator("#lost").text_content()
    with behind_socket(Desk(Watched(run.folder)), port):
        run.end("finished", 5)
        visit.state("finished")
        assert visit.tab.locator("#lost").is_hidden()
    assert not [text for text in visit.wrong if "ERR_CONNECTION" not in text]
    visit.tab.close()


def test_a_sweep_with_a_token(browser: Any, tmp_path: Path) -> None:
    root = tmp_path / "sweep"
    for rate in (1, 2):
        RunFolder(root / f"{rate}-0", trained=rate == 2).steps(1, 40)
    cells = [{"point": {"lr": rate}, "seed": 0, "folder": str(root / f"{rate}-0"), "metric": "loss", "value": 3.0 if rate == 1 else None,
              "cpu_seconds": 9.0, "failed": "boom" if rate == 3 else ""} for rate in (1, 2, 3, 4)]  # fmt: skip
    (root / "sweep.json").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    with behind_socket(Desk(Watched(root), token="long-enough-secret")) as address:
        visit = Tab(browser, address)
        tab = visit.tab
        tab.locator("#token").fill("wrong-secret")
        tab.keyboard.press("Enter")
        tab.locator("#refused", has_text="not the token").wait_for(timeout=SOON)
        tab.locator("#token").fill("long-enough-secret")
        tab.keyboard.press("Enter")
        visit.state("running")
        said = tab.locator("#job-rows tr").all_inner_texts()
        assert [re.split(r"[\t\n]", row)[:2] for row in said] == [["lr=2 · seed 0", "training"], ["lr=3 · seed 0", "failed"], ["lr=1 · seed 0", "done"], ["lr=4 · seed 0", "waiting"]]
        assert tab.locator("#quality figure").first.locator("path.line").count() == 2
        assert tab.evaluate("() => getComputedStyle(document.querySelector('#job-rows .key'), '::before').display") != "none"
        swatch = tab.locator("#rows tbody tr", has_text="lr=2").locator(".swatch").get_attribute("style")
        assert swatch == tab.locator("#job-rows .key", has_text="lr=2").get_attribute("style") and "c1" in swatch
        assert "c1" in tab.locator("#quality figure").first.locator("path.line").nth(1).evaluate("line => line.outerHTML")
        tab.locator("#job-rows .key", has_text="lr=1").click()
        assert tab.locator("#quality figure").first.locator("path.line").count() == 1
        assert tab.locator("#which option").all_text_contents() == ["lr=2 · seed 0"]
        assert tab.locator("#rows tbody tr").count() == 4
        assert not [text for text in visit.wrong if "401" not in text]
        tab.close()


def test_a_suite_over_sizes_is_drawn_as_in_its_report(browser: Any, tmp_path: Path) -> None:
    root = tmp_path / "suite"
    RunFolder(root / "runs" / "0").steps(1, 9)
    law = {"exponent": 0.5, "low": 0.4, "high": 0.6, "factor": 20.0}
    points = [{"parameters": 100, "value": 2.0}, {"parameters": 400, "value": 1.0}]
    (root / "suite.json").write_text(json.dumps({**suite("done", "failed"), "scaling": [{"label": "shc", "points": points, "fit": law}]}), encoding="utf-8")
    write_report([str(root)], tmp_path / "report.html", model=False)
    with behind_socket(Desk(Watched(root))) as address:
        watched, report = Tab(browser, address), Tab(browser, (tmp_path / "report.html").as_uri())
        for visit, place in ((watched, "#rows"), (report, "section >> nth=0")):
            curves = visit.tab.locator(place).locator("figure.chart", has_text="Against size")
            curves.wait_for(timeout=SOON)
            assert curves.locator(".legend button").all_text_contents() == ["shc", "shc, fitted"] and curves.locator("path.line").count() == 2
        tables = [visit.tab.locator(place).locator("table").first.text_content() for visit, place in ((watched, "#rows"), (report, "section >> nth=0"))]
        assert tables[0] == tables[1] and "bits per byte" in tables[0]
        assert watched.tab.locator("ul.problems").count() == 0 and report.tab.locator("ul.problems").text_content() == "shc, seed 1: out of memory"
        assert watched.wrong == [] and report.wrong == []
        watched.tab.close(), report.tab.close()


def test_thousands_of_points_are_drawn_quickly(browser: Any, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.write(*({"step": step, "loss": 5.0 / step, "seconds": step, **{f"column_{i}": step % 7 for i in range(12)}} for step in range(1, 20_001)))
    with behind_socket(Desk(Watched(run.folder))) as address:
        visit = Tab(browser, address)
        visit.state("training")
        milliseconds = visit.tab.evaluate("() => { const start = performance.now(); redraw(withCurves()); return performance.now() - start; }")
        assert milliseconds < 2000, milliseconds  # 13 charts of 5000 points; about 100 on an idle machine
        assert visit.wrong == []
        visit.tab.close()


def test_the_conversation_links_to_the_training(browser: Any, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.steps(1, 4)
    with answering(App(Scripted(), served(), live=Desk(Watched(run.folder)))) as address:
        visit = Tab(browser, address)
        visit.tab.locator("#run").click()
        visit.state("training")
        assert visit.tab.url == f"{address}/run" and visit.wrong == []
        visit.tab.close()


def test_the_page_offers_every_key_that_can_be_set() -> None:
    from treadle.live.page import page

    listed = re.search(r"const SETTABLE = (\[.*?\]);", page()[0].decode())
    assert listed is not None and json.loads(listed[1]) == list(SETTABLE)


def test_the_verb_starts_without_torch_and_ends_by_ctrl_c(tmp_path: Path) -> None:
    RunFolder(tmp_path / "runs" / "one").steps(1, 3)
    code = ("import sys, threading; from treadle import cli; import atexit; atexit.register(lambda: print(sorted({'torch', 'numpy', 'starlette'} & set(sys.modules))));"
            "sys.argv = ['treadle', 'watch', 'last', '--port', '0']; cli.main()")  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = process.stdout.readline()
    assert re.fullmatch(r"runs/one at http://127\.0\.0\.1:\d+; Ctrl-C ends the page, not the training\n", first)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and out == "[]\n"
