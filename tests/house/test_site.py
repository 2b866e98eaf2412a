"""The documentation builds as a site without a warning, names every public module, and asks no network for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOADED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=[\"']?https?://[^\"' >]+")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra docs)")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]  # --quiet would hide what --strict counts
    out = subprocess.run(
        build, cwd=ROOT, capture_output=True, text=True, timeout=280, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert out.returncode == 0, out.stderr[-3000:]
    assert "WARNING" not in out.stderr, out.stderr[-3000:]
    return folder


def test_every_page_and_module_is_in_it(site: Path) -> None:
    pages = {path.stem for path in site.glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= pages and "index" in pages
    shown = "".join(path.read_text() for path in (site / "reference").glob("*.html"))
    for module in ("models.base", "objectives.base", "data.base", "data.batch", "training.callbacks.base", "layers.attention",
                   "ops.attention", "generation.decode", "evaluation.evaluator", "planning.plan", "registry"):  # fmt: skip
        assert f'id="treadle.{module}"' in shown, module
    assert 'id="treadle.models.base.Model.materialise"' in shown  # methods too


def test_it_asks_no_network_for_anything(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert LOADED.findall(page.read_text()) == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?https?://", sheet.read_text()), sheet


def test_links_lead_to_pages_of_it(site: Path) -> None:
    """From the README too, whose links begin at the root of the repository."""
    for page in set(site.glob("*.html")) - {site / "404.html"}:  # which a server shows at any address
        for target in re.findall(r"href=[\"']?([^\"'# >]+)", page.read_text()):
            if not re.match(r"[a-z]+:", target):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
