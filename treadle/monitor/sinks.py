"""Where metrics go. Each sink takes the same rows; several may be on at once.

Rows after the step that a run resumes from are removed first, so that no step is written twice.
"""

from __future__ import annotations

import csv
import io
import json
import math
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from treadle.errors import MissingExtra
from treadle.files import write_atomically
from treadle.registry import Registry

SINKS = Registry(
    "sink",
    {
        "csv": "treadle.monitor.sinks:CsvSink",
        "jsonl": "treadle.monitor.sinks:JsonlSink",
        "tensorboard": "treadle.monitor.sinks:TensorBoardSink",
        "wandb": "treadle.monitor.sinks:WandbSink",
    },
    base="treadle.monitor.sinks:Sink",
)
# Which TensorBoard group a training column belongs to; the rest are train/*.
PERFORMANCE = {"tokens_per_second", "memory_gb", "data_wait", "seconds"}
# Statistics that an older version wrote under another name, number of the stage left out: its columns go on.
RENAMED = {"symbols_per_chunk_": "tokens_per_chunk_"}


def renamed(column: str) -> str:
    """A column of an older version by the name that rows have now."""
    for before, now in RENAMED.items():
        if column.startswith(before):
            return now + column.removeprefix(before)
    return column


class Sink(ABC):
    """One destination. `resumed_step` is the step that the run goes on from (0 for a fresh one)."""

    def __init__(self, folder: Path, resumed_step: int, run_name: str, project: str, config: dict[str, Any]) -> None:
        self.folder, self.resumed_step = folder, resumed_step
        self.run_name, self.project, self.config = run_name, project, config

    @abstractmethod
    def train(self, row: dict[str, Any]) -> None:
        """One logged training step."""

    @abstractmethod
    def evaluation(self, row: dict[str, Any]) -> None:
        """One evaluation."""

    def close(self) -> None:  # noqa: B027 - files opened per row have nothing to close
        """Flushes what is held back."""


def finite(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become None, in tables and lists too, whose keys become text and whose tuples lists."""
    if isinstance(value, dict):
        return {str(key): finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonlSink(Sink):
    """metrics.jsonl: training rows and, marked by a split, evaluation rows."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.path = self.folder / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text("utf-8").splitlines(True) if self._keep(line)]
            write_atomically(self.path, "".join(kept))
        self.stream = self.path.open("a", encoding="utf-8")

    def _keep(self, line: str) -> bool:
        try:
            return json.loads(line)["step"] <= self.resumed_step and line.endswith("\n")
        except (ValueError, KeyError, TypeError):
            return False  # a line that a crash cut short

    def train(self, row: dict[str, Any]) -> None:
        self.stream.write(json.dumps(finite(row), allow_nan=False) + "\n")
        self.stream.flush()

    evaluation = train

    def close(self) -> None:
        self.stream.close()


class CsvSink(Sink):
    """training_log.csv and eval_log.csv; the columns are those of the first row."""

    FILES = ("training_log.csv", "eval_log.csv")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.columns: dict[str, list[str]] = {}
        for name in self.FILES:
            self._trim(self.folder / name)

    def _trim(self, path: Path) -> None:
        if not path.exists():
            return
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream))
        if not rows or "step" not in rows[0]:
            path.unlink()
            return
        at = rows[0].index("step")
        kept = [r for r in rows[1:] if len(r) == len(rows[0]) and r[at].isdigit() and int(r[at]) <= self.resumed_step]
        self.columns[path.name] = rows[0] = [renamed(column) for column in rows[0]]
        text = io.StringIO(newline="")
        csv.writer(text).writerows([rows[0], *kept])
        write_atomically(path, text.getvalue())

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with (self.folder / name).open("a", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            if name not in self.columns:
                self.columns[name] = list(row)
                writer.writerow(self.columns[name])
            writer.writerow([finite(row.get(column)) for column in self.columns[name]])

    def train(self, row: dict[str, Any]) -> None:
        self._append("training_log.csv", row)

    def evaluation(self, row: dict[str, Any]) -> None:
        self._append("eval_log.csv", row)


class TensorBoardSink(Sink):
    """tensorboard/: train/*, eval/* and perf/*. Opened by the first row, since the import takes half a second."""

    writer: Any = None

    def _open(self) -> Any:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            purge = self.resumed_step + 1 if self.resumed_step else None
            self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge, flush_secs=10)
        return self.writer

    def _write(self, group: str, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "step" and math.isfinite(value):
                place = "perf" if name in PERFORMANCE else group
                self._open().add_scalar(f"{place}/{name}", value, row["step"])

    def train(self, row: dict[str, Any]) -> None:
        self._write("train", row)

    def evaluation(self, row: dict[str, Any]) -> None:
        self._write("eval", row)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class WandbSink(Sink):
    """Weights & Biases; WANDB_MODE=offline needs no account and no network. Continues the same run on resume."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        try:
            import wandb
        except ImportError:
            raise MissingExtra("report_to = wandb", "wandb") from None
        id_file = self.folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        self.run = wandb.init(
            project=self.project, name=self.run_name, id=id_file.read_text(encoding="utf-8").strip(), resume="allow",
            dir=str(self.folder), config=self.config, settings=wandb.Settings(silent=True),
        )  # fmt: skip

    def _write(self, group: str, row: dict[str, Any]) -> None:
        values = {f"{group}/{k}": v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
        self.run.log({k: v for k, v in values.items() if math.isfinite(v)}, step=row["step"])

    def train(self, row: dict[str, Any]) -> None:
        self._write("train", row)

    def evaluation(self, row: dict[str, Any]) -> None:
        self._write("eval", row)

    def close(self) -> None:
        self.run.finish()
