"""What tests share: tiny text, tiny models, tiny runs; a cache of their own; no network."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.browsers import chromium
from tests.s3 import Proxy, s3_server

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; before torch is imported
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if threading.current_thread() is threading.main_thread():  # started in the background they would ignore it, and what they start too
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Compiled loops are the same for all tests, processes and sessions; numba looks at each file's date itself.
os.environ.setdefault("NUMBA_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"treadle-numba-{os.getuid()}"))

SENTENCES = (
    "The wheel turned and the thread ran on.",
    "She had been told that the house was empty.",
    "It is a truth that nobody wishes to hear twice.",
    "He said nothing, and looked out of the window at the rain.",
    "They walked along the river until the light was gone.",
)


def make_text(lines: int = 400, seed: int = 0) -> str:
    """Deterministic text with words, numbers and paragraphs."""
    state, out = seed + 12345, []
    for n in range(lines):
        state = (1103515245 * state + 12345) % 2**31
        out.append(
            f"{SENTENCES[state % len(SENTENCES)]} {SENTENCES[(state // 7) % len(SENTENCES)]}"
            + ("\n" if n % 5 == 4 else "")
        )
    return "\n".join(out) + "\n"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data of the tests stays out of the user's cache."""
    cache = tmp_path_factory.mktemp("cache")
    os.environ["TREADLE_CACHE"] = str(cache)
    return cache


@pytest.fixture(scope="session", autouse=True)
def own_trust(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests trust stays out of the user's list of trusted code."""
    home = tmp_path_factory.mktemp("trust")
    os.environ["TREADLE_CONFIG_HOME"] = str(home)
    return home


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    """An S3 server with one bucket, for the tests of one file."""
    with s3_server() as proxy:
        yield proxy


@pytest.fixture(scope="module")  # its loop keeps asyncio.run from running, so that other modules must not see it
def browser() -> Iterator[Any]:
    """A headless Chromium, for the tests of one file."""
    with chromium() as made:
        yield made


@pytest.fixture(autouse=True)
def own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run writes down the code that its process has executed; another test's file is not that of this test."""
    from treadle import trusted_code

    monkeypatch.setattr(trusted_code, "_loaded", dict(trusted_code._loaded))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(make_text(), encoding="utf-8")
    return path


TINY = {
    "hidden_size": "32",
    "num_layers": "2",
    "num_heads": "2",
    "seq_len": "32",
    "batch_size": "4",
    "tokenizer.name": "byte",
    "logging_steps": "1",
    "sample_tokens": "0",
    "eval_rows": "4",
}


def flags(**keys: object) -> list[str]:
    """TINY with changes, as command-line flags ('__' stands for '.')."""
    merged = {**TINY, **{k.replace("__", "."): str(v) for k, v in keys.items()}}
    return [part for key, value in merged.items() for part in (f"--{key}", value)]


def treadle(
    *arguments: object, cwd: Path | None = None, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own."""
    return warm.run([*map(str, arguments)], cwd, timeout, {**os.environ, "OMP_NUM_THREADS": "1", **environment})


@pytest.fixture()
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path
