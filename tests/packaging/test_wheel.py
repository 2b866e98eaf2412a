"""The wheel in an environment that has the core dependencies and nothing else: what a person gets from `pip install treadle`.

Minutes and a gigabyte, so only `make test-slow` runs it. The installed package is mounted read-only where the system lets the
tests do that, as in a container or on a cluster's shared disk; where not, its files are compared before and after.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import flags, make_text
from tests.packaging.test_package import EXTRAS, name_of

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
SHORT = [*flags(max_steps=2, report_to="csv,tensorboard"), "--eval_steps", "2"]


def command(*words: object, cwd: Path, timeout: float = 900, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment})  # fmt: skip


def environment(folder: Path, *packages: str) -> Path:
    """The bin/ of a new virtual environment with these packages; skipped where no package index answers."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    out = subprocess.run([folder / "bin" / "pip", "install", "-q", "-c", ROOT / "constraints-cpu.txt", *packages], capture_output=True, text=True)
    if out.returncode and any(word in out.stderr for word in ("No matching distribution", "ConnectionError", "Failed to establish", "timed out")):
        pytest.skip(f"packages cannot be installed here: {out.stderr.strip().splitlines()[-1][:200]}")
    assert out.returncode == 0, out.stderr[-2000:]
    return folder / "bin"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist/ (and the wheel that it builds) and tree/ (the wheel of the checkout)."""
    folder = tmp_path_factory.mktemp("built")
    tools = environment(folder / "tools", "build", "hatchling")
    for name, kinds in (("sdist", []), ("tree", ["--wheel"])):
        out = command(tools / "python", "-m", "build", "--no-isolation", *kinds, "--outdir", folder / name, ROOT, cwd=folder)
        assert out.returncode == 0, out.stderr[-2000:]
    return folder


def contents(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


def test_the_source_distribution_builds_the_same_wheel(built: Path) -> None:
    (from_sdist,), (from_tree,) = (built / "sdist").glob("*.whl"), (built / "tree").glob("*.whl")
    assert from_sdist.name == from_tree.name and contents(from_sdist) == contents(from_tree)


def test_the_wheel_holds_every_tracked_file(built: Path) -> None:
    (wheel,) = (built / "tree").glob("*.whl")
    names = contents(wheel).keys()
    tracked = subprocess.run(["git", "ls-files", "--", "treadle", "recipes", "suites"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    wanted = {name if name.startswith("treadle/") else f"treadle/{name}" for name in tracked if (ROOT / name).exists()}
    assert wanted and wanted <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(("tests", "bench"))]


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (wheel,) = (built / "sdist").glob("*.whl")
    return environment(tmp_path_factory.mktemp("clean") / "env", str(wheel))


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder that is no checkout, with a text."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "story.txt").write_text(make_text())
    return folder


def packages_of(bin: Path) -> Path:
    (packages,) = (bin.parent / "lib").glob("python*/site-packages")
    return packages


def can_mount(folder: Path) -> bool:
    script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && ! touch "$0/x"'
    return shutil.which("unshare") is not None and command("unshare", "-m", "sh", "-c", script, folder, cwd=folder).returncode == 0


SCRIPT = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'


def listing(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_what_needs_no_extra_works_from_a_wheel(installed: Path, elsewhere: Path, tmp_path: Path) -> None:
    """Train, continue, evaluate, compare, generate, export, report, prepare, verify: with site-packages read-only."""
    packages = packages_of(installed)
    before = listing(packages)
    guard = ["unshare", "-m", "sh", "-c", SCRIPT, str(packages)] if can_mount(packages) else []
    if not guard:
        print("nothing can be mounted here: files are compared instead")
    home = {"HOME": str(tmp_path), "PATH": f"{installed}:/usr/bin:/bin"}

    def treadle(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        out = command(*guard, installed / "treadle", *words, cwd=elsewhere, **home)
        assert out.returncode == code, f"treadle {' '.join(words)}\n{out.stdout[-1500:]}\n{out.stderr[-1500:]}"
        return out

    treadle("--version")
    assert "austen" in treadle("recipes").stdout
    treadle("train", "story.txt", *SHORT)
    assert "could not be compiled" not in treadle("train", "story.txt", "--max_steps", "3").stderr
    treadle("train", "hnet", *flags(max_steps=1, report_to="csv")[2:], "--hidden_size", "32", "--output_dir", "runs/hnet", code=2)  # its own keys
    treadle("train", "gpt2", *SHORT, "--data.path", "story.txt", "--output_dir", "runs/gpt2")
    assert treadle("generate", "last", "--prompt", "She", "--max-new-tokens", "4").stdout.startswith("She")
    treadle("eval", "runs/story")
    assert "runs/gpt2" in treadle("compare", "runs/story", "runs/gpt2").stdout
    treadle("report", "runs/story", "runs/gpt2")
    assert (elsewhere / "runs" / "report.html").is_file() or list(elsewhere.rglob("report*.html"))
    treadle("export", "runs/story", "--output", "exported")
    treadle("export", "runs/story", "--format", "huggingface", "--output", "as_huggingface")
    assert json.loads((elsewhere / "as_huggingface" / "config.json").read_text())["vocab_size"]
    treadle("generate", "exported", "--prompt", "She", "--max-new-tokens", "4")
    treadle("data", "prepare", "austen", "--output", "prepared", "--tokenizer", "byte")
    treadle("train", "sft", "--from", "runs/story", *flags(max_steps=1)[-4:], "--max_steps", "1", "--sample_tokens", "0", "--output_dir", "runs/sft")
    treadle("collatz", "verify", "1", "10^5")
    treadle("plan", "story.txt", "--flops", "1e10")
    treadle("doctor", "runs/story")
    treadle("chat", "--help")
    assert "treadle[serve]" in treadle("serve", "runs/story", code=2).stderr
    assert "collatz" in command(installed / "treadle", cwd=elsewhere, **home, COMP_WORDS="treadle train col", COMP_CWORD="2",
                                _TREADLE_COMPLETE="complete_bash").stdout  # fmt: skip
    assert {name for name, date in listing(packages).items() if before.get(name) != date and not name.endswith(".pyc")} == set()
    if shutil.which("cc"):
        assert list((tmp_path / ".cache" / "treadle" / "native").glob("*.so")), "C kernels go to the cache"


def test_without_a_place_to_write_the_cache_a_model_still_answers(installed: Path, elsewhere: Path) -> None:
    """A home that takes no files: no compiled kernels, said once, and the forms in torch."""
    out = command(installed / "treadle", "generate", "runs/story", "--prompt", "She", "--max-new-tokens", "4", cwd=elsewhere,
                  HOME="/proc", TREADLE_CACHE="/proc/cache")  # fmt: skip
    assert out.returncode == 0 and out.stdout.startswith("She"), out.stderr[-1500:]


def test_all_extras_can_be_had_together(installed: Path, built: Path, tmp_path: Path) -> None:
    """pip finds releases of everything that every extra names, which agree with each other; nothing is installed."""
    (wheel,) = (built / "sdist").glob("*.whl")
    extras = sorted(EXTRAS.keys() - {"dev"})
    out = command(installed / "pip", "install", "--dry-run", "-q", "--report", tmp_path / "report.json", "-c", ROOT / "constraints-cpu.txt",
                  f"{wheel}[{','.join(extras)}]", cwd=tmp_path, HOME=str(tmp_path), timeout=1800)  # fmt: skip
    assert out.returncode == 0, out.stderr[-1500:]
    found = {re.sub(r"[-_.]+", "-", one["metadata"]["name"]).lower() for one in json.loads((tmp_path / "report.json").read_text())["install"]}
    wanted = {re.sub(r"[-_.]+", "-", name_of(r)) for extra in extras for r in EXTRAS[extra] if not r.startswith("treadle")}
    there = {re.sub(r"[-_.]+", "-", p.name.partition("-")[0]).lower() for p in packages_of(installed).glob("*.dist-info")}
    assert wanted <= found | there  # torch brings fsspec


def test_the_metadata(installed: Path) -> None:
    code = ("import importlib.metadata as m, treadle, json; d = m.metadata('treadle'); "
            "print(json.dumps([treadle.__version__, d['Version'], d['License-Expression'], sorted(d.get_all('Provides-Extra'))]))")  # fmt: skip
    ours, theirs, licence, extras = json.loads(command(installed / "python", "-c", code, cwd=Path("/")).stdout)
    assert ours == theirs and licence == "Apache-2.0" and {"hf", "serve", "all"} <= set(extras)
    typed = (packages_of(installed) / "treadle" / "py.typed").is_file()
    assert typed and os.access(installed / "treadle", os.X_OK)
