"""The documents tell the truth: their Python runs, their commands exist, their lists are whole."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import make_text, treadle
from tests.guides.commands import commands_in
from treadle.help import section_lines
from treadle.models.catalogue import MODELS
from treadle.training.config import SECTIONS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.S)


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if blocks(p)], ids=lambda p: p.name)
def test_python_blocks_run(path: Path, in_folder: Path) -> None:
    """All blocks of a document, in order, in one process: a reader types them one after another."""
    import subprocess
    import sys

    (in_folder / "story.txt").write_text(make_text())
    program = "\n".join(blocks(path))
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=in_folder, timeout=200)
    assert out.returncode == 0, out.stderr[-3000:]


SHORT = ["--num_layers", "1", "--hidden_size", "32", "--num_heads", "2", "--batch_size", "2", "--seq_len", "32",
         "--eval_rows", "2", "--sample_tokens", "2", "--eval_steps", "100", "--model.head_dim", "16"]  # fmt: skip

TINY_SUITE = """
base = "story.txt"
[budget]
bytes = 2000
[keys]
seq_len = 32
per_device_train_batch_size = 2
eval_rows = 2
"tokenizer.name" = "byte"
[shape]
hidden_size = 16
num_layers = 1
num_heads = 1
[[entries]]
label = "transformer"
"""


@pytest.mark.timeout(900)  # two dozen commands of five seconds each, on a machine that may be busy
def test_the_readmes_commands_run(in_folder: Path) -> None:
    """Every command of the README in its order, training made short."""
    (in_folder / "story.txt").write_text(make_text(2000))
    (in_folder / "other.txt").write_text(make_text(2000, seed=1))
    (in_folder / "unseen.txt").write_text(make_text(100, seed=2))
    (in_folder / "prompts.txt").write_text("The\n")
    (in_folder / "recipes").symlink_to(ROOT / "recipes")
    steps = iter(range(2, 100))
    seen = 0
    for _, *line in map(shlex.split, commands_in(ROOT / "README.md")):
        if line[0] == "train" and "--help" not in line:
            skip = [
                i for f in ("--max_steps", "--hidden_size") if f in line for i in (line.index(f), line.index(f) + 1)
            ]
            line = [word for i, word in enumerate(line) if i not in skip]
            shape = SHORT if "--from" not in line else SHORT[6:-2]
            if "--devices" in line:  # the run was started with 2 rows in one process
                shape = SHORT[:6] + SHORT[8:]
            line += [*shape, "--max_steps", str(next(steps))]
        if "--suite" in line:  # half an hour as it stands: tests/suite runs small ones
            (in_folder / "tiny.toml").write_text(TINY_SUITE)
            line = ["tiny.toml" if word == "architectures" else word for word in line]
        if line[0] == "check":
            line += [*SHORT, "--max_steps", "2"]
        if line[0] == "sweep":
            line += SHORT
        if line[0] == "generate":
            line += ["--max-new-tokens", "3"]
        out = treadle(*line, cwd=in_folder)
        assert out.returncode == 0, f"treadle {' '.join(line)}\n{out.stderr}"
        seen += 1
    assert seen >= 17


def test_the_list_of_options_is_current() -> None:
    """docs/options.md holds every key with its default; `python -m treadle.help > docs/options.md` writes it."""
    text = (ROOT / "docs" / "options.md").read_text()
    models = {name: MODELS.get(name) for name in MODELS.names()}
    own = {f"model ({name})": model.Config for name, model in models.items() if model.__module__.startswith("treadle.")}
    sections = {**SECTIONS, **own}  # and none that another test has registered in this process
    for name, cls in sections.items():
        assert "\n".join(section_lines(name, cls)) in text, f"docs/options.md is stale at [{name}]"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
