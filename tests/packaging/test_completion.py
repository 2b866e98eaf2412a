"""Shells complete verbs, runs, recipes, architectures and every key, at once and without torch."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from treadle import completion
from treadle.cli import app
from treadle.models.catalogue import MODELS
from treadle.recipe import builtin_recipes
from treadle.training.config import SECTIONS

COMMAND = typer.main.get_command(app)


def said(line: str) -> list[str]:
    """What completes a line whose last word (maybe empty) is being typed."""
    *typed, start = line.split(" ")
    return [word.value for word in completion.words_for(COMMAND, typed, start)]


@pytest.mark.parametrize("arch", [None, *MODELS.names()])
def test_the_keys_read_from_the_source_are_the_keys(arch: str | None) -> None:
    """completion.py parses the classes of sections; here they are imported."""
    found = completion.section_keys(arch)
    model = MODELS.get(arch or "transformer").Config
    assert {name: set(keys) for name, keys in found.items()} == {
        name: set(cls.model_fields) for name, cls in {**SECTIONS, "model": model}.items()
    }


def test_every_key_of_help_all_completes() -> None:
    keys = {key for section in completion.section_keys().values() for key in section}
    offered = {flag.removeprefix("--").rpartition(".")[2] for flag in said("train --")}
    assert keys <= offered
    assert said("train --optim.learning_r") == ["--optim.learning_rate"]
    assert said("train --learning_r") == ["--learning_rate"]
    assert said("train --learning-r") == ["--learning-rate"]  # as typed
    assert said("train --model.arch hnet --num_bl") == ["--num_blocks"]
    assert "--fresh" in said("train --") and "--recommend" in said("plan --") and "--teacher" in said("distill --")
    assert "--over" in said("sweep --") and "--learning_rate" in said("sweep --")


def test_values() -> None:
    assert said("train --model.arch ") == MODELS.names() == said("train --arch = ")  # bash parts --arch=
    assert said("train --precision bf") == ["bf16"]
    assert said("train --gradient_checkpointing ") == ["true", "false"]
    assert said("train --help opt") == ["optim"]
    assert "all" in said("train --help ") and "learning_rate" in said("train --help ")
    assert said("export last --format hug") == ["huggingface"]
    assert said("train --run_name ") == []


def test_verbs_and_arguments(in_folder: Path) -> None:
    assert {"train", "generate", "collatz"} <= set(said("")) and "prepare" not in said("")
    assert "verify" in said("collatz ") and "--help" in said("collatz verify --")
    for name in ("first", "second"):
        (in_folder / "runs" / name / "checkpoints" / "step-00000004").mkdir(parents=True)
    (in_folder / "story.txt").write_text("x")
    (in_folder / "picture.png").write_text("x")
    assert said("eval ") == ["last", "runs/first", "runs/second"] == said("compare runs/first ")
    assert said("eval runs/f") == ["runs/first"]
    assert said("eval runs/first@") == ["runs/first@best", "runs/first@4"]
    assert said("generate --temperature 0.5 runs/s") == ["runs/second"]  # 0.5 is the option's
    assert said("generate last ") == []
    assert said("train --from runs/s") == ["runs/second"]
    assert set(said("train ")) == {*builtin_recipes(), "story.txt", "runs/"}
    assert said("train st") == ["story.txt"]


def test_choices_are_what_the_verbs_take() -> None:
    """CHOICES names options of verbs, and their help tells of each value."""
    helps = {p.name: p.help or "" for c in _verbs(COMMAND) for p in c.params if p.name in completion.CHOICES and getattr(p, "help", None)}
    assert set(helps) == set(completion.CHOICES)
    for name, values in completion.CHOICES.items():
        assert [value for value in values if value not in helps[name]] == [], name


def _verbs(command: object) -> list[object]:
    inner = getattr(command, "commands", {})
    return [command, *(verb for c in inner.values() for verb in _verbs(c))]


def asked(shell: str, line: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environ = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_TYPER_COMPLETE_ARGS": line, "_TREADLE_COMPLETE": f"complete_{shell}", **more}
    return subprocess.run([sys.executable, "-m", "treadle"], cwd=cwd, capture_output=True, text=True, env={**os.environ, **environ}, timeout=60)


def test_a_folder_with_a_hostile_name_reaches_no_shell(in_folder: Path) -> None:
    """zsh evaluates the answer: a name with its characters is not offered."""
    for name in ("good", "$(touch pwned)", "a'b", "x;y", "with space"):
        (in_folder / "runs" / name).mkdir(parents=True)
    assert asked("zsh", "treadle eval runs/", in_folder).stdout == "_arguments '*: :((\"runs/good\"))'\n"
    assert asked("bash", "treadle eval runs/", in_folder).stdout == "runs/good\n"


def test_formats_of_the_shells(in_folder: Path) -> None:
    assert asked("zsh", "treadle se", in_folder).stdout.startswith("_arguments '*: :((\"serve\":\"")
    assert asked("zsh", "treadle train --run_name ", in_folder).stdout == "_files\n"
    fish = {"_TYPER_COMPLETE_FISH_ACTION": "is-args"}
    assert asked("fish", "treadle se", in_folder, **fish).returncode == 0
    assert asked("fish", "treadle train --run_name ", in_folder, **fish).returncode == 1
    assert asked("fish", "treadle se", in_folder, _TYPER_COMPLETE_FISH_ACTION="get-args").stdout.startswith("serve\t")


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes(in_folder: Path) -> None:
    """typer's script in a real bash, which asks this command."""
    script = subprocess.run([sys.executable, "-m", "treadle", "--show-completion"], capture_output=True, text=True, timeout=60,
                            env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": ""})  # fmt: skip
    if "complete -o default" not in script.stdout:
        pytest.skip(f"the shell around the tests is not bash: {script.stdout[:60]!r} {script.stderr[:60]!r}")
    (in_folder / "treadle").write_text(f'#!/bin/sh\nexec {sys.executable} -m treadle "$@"\n')
    (in_folder / "treadle").chmod(0o755)
    line = 'COMP_WORDS=(./treadle train --model.arch hn); COMP_CWORD=3; _treadle_completion ./treadle; echo "${COMPREPLY[@]}"'
    out = subprocess.run(["bash", "-c", f"{script.stdout}\n{line}"], capture_output=True, text=True, cwd=in_folder, timeout=60)
    assert out.stdout == "hnet\n", out.stderr


def test_it_answers_at_once_without_torch(in_folder: Path) -> None:
    """CPU seconds (a press of a key, 0.2 s on an idle core; other work on the core about doubles them)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert asked("bash", "treadle train --learning_r", in_folder).stdout == "--learning_rate\n"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.6
    code = "import sys; import treadle.cli; treadle.cli._run(); print(sorted({'torch', 'pydantic', 'numpy', 'rich'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=in_folder, timeout=60,
                         env={**os.environ, "COMP_WORDS": "treadle train --model.arch hnet --num_bl", "COMP_CWORD": "4",
                              "_TREADLE_COMPLETE": "complete_bash"})  # fmt: skip
    assert out.stdout == "--num_blocks\n[]\n", out.stderr


def test_version() -> None:
    import treadle
    from treadle.monitor.records import versions

    out = subprocess.run([sys.executable, "-m", "treadle", "--version"], capture_output=True, text=True, timeout=60)
    assert out.stdout == f"treadle {treadle.__version__}\n"
    assert versions()["treadle"] == treadle.__version__
