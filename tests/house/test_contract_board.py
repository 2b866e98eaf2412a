"""The board names every contract that there is and every architecture, and a failure is seen on it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

from tools.contract_board import BEGIN, CONTRACTS, DOCUMENT, END, README, SHORT, Board, replaced, shortened

TESTS = Path(__file__).parents[1] / "contracts"


def test_contracts_rows_and_the_document() -> None:
    numbers = {found for file in TESTS.glob("test_*.py") for found in re.findall(r"^def test_(\d\d)_", file.read_text(), flags=re.M)}
    assert numbers == set(CONTRACTS)
    text = DOCUMENT.read_text()
    board, legend = text.split(BEGIN)[1].split(END)
    assert re.findall(r"^\| ([a-z][^|]*?) \|", board, flags=re.M)[1:] == list(dict.fromkeys(Board().rows.values()))
    assert "FAILED" not in board and all(f"| {number} | {what} |" in legend for number, what in CONTRACTS.items())

    readme = README.read_text()
    assert readme == replaced(readme, SHORT, shortened(board)) and "✓" in readme


def test_a_short_board_hides_no_failure() -> None:
    table = "| architecture | 01 | 02 | 03 | 04 |\n|---|---|---|---|---|\n| shc | 2 | 1 FAILED | decodes |   |\n"
    assert shortened(table).splitlines()[-1] == "| shc | ✓ | 1 FAILED | - |  |"


def test_what_a_cell_says() -> None:
    board = Board()

    def report(contract: str, outcome: str, reason: str = "") -> None:
        board.pytest_runtest_logreport(SimpleNamespace(  # type: ignore[arg-type]
            nodeid=f"tests/contracts/test_contracts.py::test_{contract}_x[bf16-shc-1]", when="call", outcome=outcome,
            skipped=outcome == "skipped", failed=outcome == "failed", longrepr=("file", 1, reason),
        ))  # fmt: skip

    report("01", "passed")
    report("01", "passed")
    report("02", "passed")
    report("02", "failed")
    report("03", "skipped", "Skipped: shc declares decodes = False")
    cells = next(line for line in board.table() if line.startswith("| shc ")).split(" | ")
    assert cells[1:5] == ["2", "1 FAILED", "decodes", " "]
