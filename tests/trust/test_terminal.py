"""What others have written reaches a terminal as visible characters, and a file or a pipe as it is."""

from __future__ import annotations

import ast
import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import treadle as package
from tests.conftest import treadle
from tests.trust.test_hostile import checkpoint
from treadle import cli, terminal
from treadle.monitor.console import Console

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\x08\r\x7f\u202egnp.exe\u2028"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\x9b31m\x08\r\x7f\u202egnp.exe\u2028"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_characters_that_act_are_shown() -> None:
    assert terminal.visible(HOSTILE) == SHOWN
    assert terminal.visible("\ud800") == r"\ud800"
    plain = "Zeilen\nund\tTabs, Ümlaute, 漢字, العربية, 👩‍👩‍👧 \\x1b"
    assert terminal.visible(plain) == plain


@pytest.mark.parametrize("number", [*range(32), *range(127, 160)])
def test_no_control_character_but_newline_and_tab(number: int) -> None:
    assert (terminal.visible(chr(number)) == chr(number)) == (chr(number) in "\n\t")


def test_only_a_terminal_is_treated_so() -> None:
    for stream, wanted in ((Terminal(), SHOWN), (io.StringIO(), HOSTILE)):
        terminal.write(HOSTILE, stream, end="")
        assert stream.getvalue() == wanted
    closed = io.StringIO()
    closed.close()
    assert not terminal.is_terminal(closed) and not terminal.is_terminal(None)


def test_the_console(monkeypatch: pytest.MonkeyPatch) -> None:
    out, errors = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stderr", errors)
    console = Console(stream=out)
    console.say(HOSTILE)
    console.warn(HOSTILE)
    console.start(0, 10)  # the live line has escape sequences of its own
    console.say(f"within {HOSTILE}")
    console.warn(f"within {HOSTILE}")
    console.stop()
    assert errors.getvalue() == f"warning: {SHOWN}\n" and out.getvalue().startswith(SHOWN + "\n")
    assert out.getvalue().count("owned") == 3
    for act in ("\x1b]0", "\x9b", "\x07", "\u202e"):
        assert act not in out.getvalue()


def typed(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, *line: object) -> str:
    """What a verb writes, in this process."""
    monkeypatch.setattr(sys, "argv", ["treadle", *map(str, line)])
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli._run() == 0
    return stream.getvalue()


def test_samples_and_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of random weights over bytes says control characters by itself."""
    run = checkpoint(tmp_path / "run")
    line = ["generate", run, "--prompt", HOSTILE, "--max-tokens", 60, "--device", "cpu"]
    exact = typed(monkeypatch, io.StringIO(), *line)
    shown = typed(monkeypatch, Terminal(), *line)
    assert exact.startswith(HOSTILE) and shown == terminal.visible(exact[:-1]) + "\n"
    said = exact[len(HOSTILE) : -1]
    assert terminal.visible(said) != said  # it did


def test_errors_and_file_names_in_a_terminal_and_a_pipe(tmp_path: Path) -> None:
    name = "no\x1b[2J.txt"
    for line, code in ((["data", "stats", name], 2), (["data", name], 2), (["doctor", "a", name], 2)):
        main, side = pty.openpty()
        done = subprocess.run([sys.executable, "-m", "treadle", *line], cwd=tmp_path, stdin=side, stdout=side, stderr=side,
                              env={**os.environ, "TERM": "xterm"})  # fmt: skip
        os.close(side)
        seen = b""
        try:
            while part := os.read(main, 65536):
                seen += part
        except OSError:
            pass
        os.close(main)
        assert done.returncode == code and rb"no\x1b[2J.txt" in seen and b"\x1b" not in seen, seen
    piped = treadle("data", "stats", name, cwd=tmp_path)
    assert piped.returncode == 2 and name in piped.stderr


def test_nothing_is_written_past_the_guard() -> None:
    """print, typer.echo and streams would send text raw; help.py writes only what treadle itself says."""
    root = Path(package.__file__).parent
    for path in root.rglob("*.py"):
        if path.name in ("terminal.py", "help.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Name, ast.Attribute)):
                said = ast.unparse(node)
                assert said not in ("print", "typer.echo", "sys.stdout.write", "sys.stderr.write"), f"{path}: line {node.lineno}"
