"""`treadle collatz`: light help, one line for every mistake, exit codes that scripts can trust, audits that find what is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from treadle import cli
from treadle.collatz import blocks, checking, sieve, workers
from treadle.collatz.certificates import header, sealed, unsealed
from treadle.collatz.plots import Series, text_plot, trajectory_heights
from treadle.collatz.progress import Line, duration, rounded
from treadle.collatz.verify import verify

Run = Any
START = 1 << 68


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("verify", ...)` -> (exit code, standard output, error output), in this process and a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["treadle", "collatz", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, error = capsys.readouterr()
        return int(ended.value.code or 0), out, error

    return call


def test_the_help_lists_the_verbs_and_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom treadle.cli import main\nsys.argv = ['treadle', 'collatz', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'numpy', 'numba', 'matplotlib', 'ray'} & set(sys.modules)"
    )
    began = time.monotonic()
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert time.monotonic() - began < 5  # .3 s on an idle machine
    verbs = [match[1] for match in re.finditer(r"^  ([a-z]+) ", out.stdout.partition("Commands:")[2], re.M)]
    assert verbs == ["verify", "search", "cycles", "records", "bound", "audit", "merge", "plot", "train"]


@pytest.mark.parametrize(
    "words",
    [
        ("verify",), ("verify", "x"), ("verify", "2^68"), ("verify", "2^68", "2^69", "--count", "5"), ("verify", "5", "4"),
        ("verify", "0", "9"), ("verify", "-5", "9"), ("verify", "2^68", "--count", "0"), ("verify", "2^68", "--count", "-1"),
        ("verify", "2^68", "--count", "many"), ("verify", "1.5", "9"), ("verify", "2^1001", "--count", "9"),
        ("verify", "2^126", "--count", "2^36"), ("verify", "9", "99", "--bits", "7"), ("verify", "9", "99", "--bits", "45"),
        ("verify", "9", "99", "--bits", "x"), ("verify", "9", "99", "--workers", "0"), ("verify", "9", "99", "--path", "c"),
        ("verify", "9", "99", "--output", "."), ("verify", "9", "99", "--unknown"), ("verify", "9**9**9", "9"),
        ("audit",), ("audit", "none.jsonl"), ("audit", "."), ("merge",), ("merge", "none.jsonl"),
        ("plot",), ("plot", "x"), ("plot", "0"), ("plot", "none.jsonl"), ("plot", "27", "--output", "a.txt"), ("nothing",),
    ],
    ids=" ".join,
)  # fmt: skip
def test_nonsense_is_one_line_and_exit_code_2(run: Run, words: tuple[str, ...]) -> None:
    code, out, error = run(*words)
    assert code == 2 and not out, (out, error)
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 400, error
    assert not list(Path().glob("*.jsonl"))


def test_an_interval_from_start_to_audit_and_picture(run: Run) -> None:
    words = ("verify", "2^68", "--count", "2^16", "--path", "python", "--workers", "1", "--bits", "14")
    code, out, error = run(*words)
    assert code == 0 and not error
    name = "collatz-2^68-to-2^68+2^16.jsonl"
    assert "proved: every n in [2^68, 2^68+2^16), 65,536 numbers" in out and f"audit '{name}'" in out
    assert Path(name).is_file() and "largest number met: 2" in out and "n/s" in out
    digest = re.search(r"digest (\w{64})", out)
    code, again, _ = run("verify", "2^68", "2^68+2^16", "--bits=14")
    assert code == 0 and "nothing was left to do" in again and digest and digest[1] in again
    code, out, _ = run("audit", name, "--samples", "4", "--path", "python")
    assert code == 0 and digest[1] in out and "the certificate passed its audit" in out
    assert int(re.search(r"([\d,]+) excluded numbers with a witness", out)[1].replace(",", "")) > 3000  # type: ignore[index]
    code, out, _ = run("merge", name, "--from", "2^68", "--to", "2^68+2^16")
    assert code == 0 and digest[1] in out and "4 blocks cover it" in out
    code, out, _ = run("merge", name, "--from", "2^68-1")
    assert code == 1 and "hole: [" in out and "1 numbers is not proved" in out
    code, out, _ = run("plot", name)
    assert code == 0 and "numbers a second of work" in out and "largest number met" in out


def test_json_is_the_only_thing_on_standard_output(run: Run) -> None:
    code, out, error = run("verify", "1000", "--count", "5_000", "--json", "--output", "a.jsonl", "--path=python")
    result = json.loads(out)
    assert code == 0 and not error and result["complete"] and result["proved"] == "5000" and result["certificate"] == "a.jsonl"
    code, out, _ = run("audit", "a.jsonl", "--json")
    assert code == 0 and json.loads(out)["passed"]
    code, out, _ = run("merge", "a.jsonl", "--json", "--output", "b.jsonl")
    assert code == 0 and json.loads(out)["digest"] == result["digest"] and Path("b.jsonl").is_file()


def test_dashes_and_underscores_are_the_same(run: Run) -> None:
    assert run("merge", "--help")[0] == 0
    assert run("verify", "300", "600", "--as_json")[0] == 2
    assert run("search", "--help")[1] == run("search", "--help")[1] != ""


def test_a_possible_counterexample_ends_with_its_own_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "best_kind", lambda path: "threads")
    words = ("verify", "2^68", "--count", "2^12", "--path", "python", "--output", "a.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "MOST_STEPS", 60)
        code, out, error = run(*words)
    assert code == 3 and out.count("!!!") >= 2 and "counterexample" in out and "not finished: 0 of 4,096" in out
    assert error.startswith("error: 29514790517935") and error.count("\n") == 1
    code, out, _ = run("audit", "a.jsonl", "--path", "python")
    assert code == 65 and "counterexample" in out and "FAILED" in out


def test_a_certificate_of_a_broken_sieve_fails_its_audit(run: Run) -> None:
    high = (1 << 48) + 12345
    path = Path("a.jsonl")
    result = verify(high << 20, (high + 1) << 20, path, path="python", workers=2, rules="broken")
    assert result.complete  # nothing in the result shows it
    code, out, error = run("audit", "a.jsonl")
    assert code == 65 and "gives other totals when it is computed again" in out and "failed its audit" in error


def test_a_broken_sieve_in_this_installation_is_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    high = (1 << 48) + 12345
    verify(high << 20, (high + 1) << 20, "a.jsonl", path="python", workers=2, rules="broken")
    monkeypatch.setitem(sieve.RULES, "tree", sieve.RULES["broken"])  # computes the same totals again
    code, out, _ = run("audit", "a.jsonl", "--path", "python")
    assert code == 65 and "without a reason" in out and "computed again (" not in out


@pytest.mark.parametrize("damage", ["digit", "maximum", "forged", "missing"])
def test_an_audit_finds_damage_and_false_claims(run: Run, damage: str) -> None:
    path = Path("a.jsonl")
    verify(START, START + (1 << 14), path, path="python", workers=1)
    line = path.read_bytes().splitlines()[1]
    record = unsealed(line)
    if damage == "digit":
        line = line.replace(b'"odd_steps":', b'"odd_steps":1', 1)
    else:
        name, value = {"maximum": ("maximum", "9" * 30), "forged": ("leaves", 3), "missing": ("argmax", "5")}[damage]
        record["totals"][name] = record["parts"][0][name] = value
        line = sealed(record).rstrip()
    path.write_bytes(sealed(header()) + line + b"\n")
    code, out, error = run("audit", "a.jsonl", "--samples", "1")
    assert code == 65 and "line 2" in out and "FAILED" in out and "a.jsonl" in error
    expected = {"digit": "sha256", "maximum": "largest number met is", "forged": "leaves differ", "missing": "not in it"}
    assert expected[damage] in out


def test_a_plot_of_a_trajectory(run: Run) -> None:
    code, out, _ = run("plot", "27", "--width", "60")
    lines = out.splitlines()
    assert code == 0 and lines[0] == "27: 111 steps to 1, at most 9,232"
    assert max(len(line) for line in lines) <= 60 and len(lines) == 19
    assert lines[1].startswith("13.2 |") and lines[-2].startswith("log2 +") and lines[-1].split()[-1] == "111"
    assert run("plot", "2^200-1")[0] == 0 and run("plot", "1")[0] == 0
    assert len(trajectory_heights(27).values) == 112


def test_a_plot_shows_the_highest_value_of_every_column() -> None:
    lines = text_plot(Series("t", "x", "y", [0.0, 5.0, 1.0, 1.0, 1.0, 10.0] * 50), 40, 11)
    assert all("*" in lines[row] for row in (1, 11))
    assert all("*" * 20 in line for line in lines[1:12])  # six values in a column, from 0 to 10


def test_a_picture(run: Run) -> None:
    pytest.importorskip("matplotlib")
    assert run("plot", "27", "--output", "a.png")[0] == 0
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from treadle.collatz import plots

    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    code, _, error = run("plot", "27", "--output", "a.png")
    assert code == 2 and "treadle[collatz]" in error


class Terminal:
    """A stream that says it is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


def test_the_line_lives_in_a_terminal_and_is_gone_at_the_end() -> None:
    stream: Any = Terminal()
    line = Line(stream=stream)
    assert line.due
    line.show("10% \x1b[2J")
    assert not line.due
    line.say("a word")
    line.show("20%")
    line.clear()
    assert stream.text == "\r10% \\x1b[2J\x1b[K\r\x1b[Ka word\n\r20%\x1b[K\r\x1b[K"


def test_a_pipe_gets_plain_lines_now_and_then(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open(tmp_path / "out", "w+") as stream:
        line = Line(stream=stream)
        assert not line.due
        now = time.monotonic() + 100
        monkeypatch.setattr(time, "monotonic", lambda: now)
        assert line.due
        line.show("10%")
        assert not line.due and not Line(quiet=True, stream=stream).due
        stream.seek(0)
        assert stream.read() == "10%\n"


def test_numbers_and_durations_for_people() -> None:
    assert [rounded(value) for value in (950.4, 20300000000.0, 12345)] == ["950", "2.03e10", "1.23e4"]
    seconds = (5, 65, 3725, 86400 * 3, 86400 * 1000, 86400 * 365.25 * 5000)
    assert [duration(each) for each in seconds] == ["0:05", "1:05", "1:02:05", "3.0 days", "2.7 years", "5000 years"]


def test_progress_is_shown_and_a_reader_who_leaves_is_no_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "treadle", "collatz", "verify", "2^68", "--count", "2^18", "--bits", "12", "--path", "python"]
    program = "from treadle.collatz import progress\nprogress.PLAIN_SECONDS = 0\n"
    program += f"import sys\nfrom treadle.cli import main\nsys.argv = {command[2:]!r}\nif __name__ == '__main__':\n    main()\n"
    (tmp_path / "shown.py").write_text(program)
    out = subprocess.run([sys.executable, "shown.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100,
                         env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])})  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert re.search(r"^\d+\.\d\d% of 2\^18  \S+ n/s  ETA 0:\d\d$", out.stdout, re.M), out.stdout


def test_the_audit_looks_at_units_of_unfinished_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "best_kind", lambda path: "threads")
    looks = iter(range(100))
    path = tmp_path / "a.jsonl"
    result = verify(START, START + (1 << 20), path, path="python", workers=1, stopping=lambda: next(looks) > 4)
    assert not result.complete
    report = checking.check_certificate(path, samples=3)
    assert report.recomputed == 3 and not report.blocks and not report.failures and report.justified > 1000
