"""Which architecture keeps which contract: runs tests/contracts and prints a table.

    make contracts                                                  # prints it (minutes)
    python -m tools.contract_board --write docs/contracts.md        # and writes it into the document

README.md gets the same, shortened: a check mark where all of a contract's checks passed. A cell counts the checks that passed. A
contract is left out only by a declared capability, which the table names; a failure is printed in capitals, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tests.contracts.conftest import CASES, KINDS, SHAPES

CONTRACTS = {
    "01": "causal: a later token changes nothing before it",
    "02": "a row alone is the row in a batch",
    "03": "decoding, in chunks and with padding, is the full forward pass",
    "04": "packed documents do not see each other, forward and backward",
    "05": "sums add up over micro-batches",
    "06": "weights made on the meta device are those made directly",
    "07": "one process = DDP = FSDP",
    "08": "a resumed run and an evaluated one are the uninterrupted run, bit for bit",
    "09": "operations agree with torch's counter",
    "10": "gradient checkpointing changes no gradient and saves memory",
    "11": "export and import are bit-equal",
    "12": "a step in bf16 and one in fp16 are finite",
    "13": "it learns: better than single frequencies of bytes after 150 steps",
    "14": "no reads from the device, nothing on another device",
    "15": "every parameter gets a gradient",
}
ROOT = Path(__file__).parents[1]
DOCUMENT, README = ROOT / "docs" / "contracts.md", ROOT / "README.md"
BEGIN, END = "<!-- the board: python -m tools.contract_board --write docs/contracts.md -->\n", "<!-- end of the board -->\n"
SHORT = "<!-- the board, shortened -->\n"


def shortened(board: str) -> str:
    """The board's table with a mark for every cell: kept, FAILED, left out by a declared capability (-) or left to another row."""

    def mark(cell: str) -> str:
        return "✓" if cell.isdigit() else cell if "FAILED" in cell else "-" if cell else ""

    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in board.splitlines() if line.startswith("|")]
    return "".join(f"| {' | '.join([name, *(cells if name in ('architecture', '---') else map(mark, cells))])} |\n" for name, *cells in rows)


def replaced(text: str, begin: str, inside: str) -> str:
    """`text` with what stands between a mark and the end of the board replaced."""
    before, _, rest = text.partition(begin)
    return before + begin + inside + END + rest.partition(END)[2]


@dataclass
class Cell:
    """What the checks of one contract said for one architecture."""

    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        if self.outcomes["failed"]:
            return f"{self.outcomes['failed']} FAILED"
        if self.outcomes["passed"]:
            return str(self.outcomes["passed"])
        return ", ".join(sorted(self.reasons)) or " "


def rows() -> dict[tuple[str, int], str]:
    """Each case's row: its architecture, and for a transformer of other token mixers which they are."""
    named = {}
    for name, number in CASES:
        kinds = [kind for kind in SHAPES[name][number].get("layer_types", []) if kind in KINDS]
        named[name, number] = name if not kinds else f"{name}, {kinds[0]}" if len(kinds) == 1 else f"{name}, hybrid of all"
    return named


class Board:
    """A plugin of pytest that collects outcomes by contract and architecture."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], Cell] = defaultdict(Cell)
        self.rows = rows()
        self.case = re.compile(r"\b(" + "|".join(sorted({n for n, _ in CASES}, key=len, reverse=True)) + r")-(\d+)\b")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        contract, case = re.search(r"::test_(\d\d)_", report.nodeid), self.case.search(report.nodeid)
        if contract is None or case is None or not (report.when == "call" or report.skipped or report.failed):
            return
        cell = self.cells[self.rows[case[1], int(case[2])], contract[1]]
        cell.outcomes[report.outcome] += 1
        if report.skipped and isinstance(report.longrepr, tuple):
            declared = re.search(r"declares (\w+)", report.longrepr[2])
            cell.reasons.add(declared[1] if declared else "needs another torch")

    def table(self) -> list[str]:
        found = [f"| architecture | {' | '.join(CONTRACTS)} |", "|---|" + "---|" * len(CONTRACTS)]
        for row in dict.fromkeys(self.rows.values()):
            found.append(f"| {row} | {' | '.join(str(self.cells.get((row, number), Cell())) for number in CONTRACTS)} |")
        return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.contract_board", description=__doc__)
    parser.add_argument("--write", type=Path, help="the document whose board is replaced")
    parser.add_argument("--workers", default="2", help="processes of pytest-xdist; 0: this one")
    parser.add_argument("--only", help="what pytest's -k takes")
    given = parser.parse_args()
    board = Board()
    options = [str(Path(__file__).parents[1] / "tests" / "contracts"), "-q", "-n", given.workers, "--no-header", "-p", "no:cacheprovider"]
    status = pytest.main([*options, *(["-k", given.only] if given.only else [])], plugins=[board])
    lines = [*board.table(), "", f"{datetime.date.today()}, torch {torch.__version__}, Python {platform.python_version()}, "
             f"{'a GPU too' if torch.cuda.is_available() else 'no GPU'}."]  # fmt: skip
    print("\n".join(["", *lines, "", *(f"{number}  {text}" for number, text in CONTRACTS.items())]))
    if given.write is not None:
        given.write.write_text(replaced(given.write.read_text(), BEGIN, "\n".join(lines) + "\n"))
        README.write_text(replaced(README.read_text(), SHORT, shortened("\n".join(lines))))
    raise SystemExit(int(status))


if __name__ == "__main__":
    main()
