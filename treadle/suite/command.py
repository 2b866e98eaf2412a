"""`treadle compare --suite`: from what was typed to the table."""

from __future__ import annotations

import sys
from pathlib import Path

from treadle.errors import ConfigError
from treadle.suite import run as running
from treadle.suite.settings import builtin_suites, read_suite
from treadle.suite.table import lines_of
from treadle.terminal import columns, write


def compare_suite(named: str | None, runs: list[str] | None, output: str | None, workers: int | None, ray: bool) -> None:
    """Runs the suite and writes its table to the terminal; ConfigError for a call that names neither or both."""
    if named is None and (workers is not None or ray):
        raise ConfigError("--workers and --ray go with a suite: --suite FILE.toml")
    if named is None:
        raise ConfigError(f"name runs to compare, as in treadle compare RUN RUN, or a suite: --suite FILE.toml, or --suite "
                          f"{' or '.join(builtin_suites())}")  # fmt: skip
    if runs:
        raise ConfigError(f"--suite trains what it compares; leave {' '.join(runs)} out, or leave --suite out")
    suite = read_suite(named)
    folder = Path(output) if output is not None else Path("runs") / suite.name
    result = running.run(suite, folder, write, workers, ray)
    write("")
    for line in lines_of(result, columns(sys.stdout), str(folder / running.MARKDOWN)):
        write(line)
    write(f"written: {', '.join(str(folder / name) for name in (running.RESULT, running.MARKDOWN, running.PICTURE))}")
    if (problem := running.unfinished(result)) is not None:
        raise problem
