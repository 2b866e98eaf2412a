"""The log of a search: lines of JSON with a SHA-256 each, only ever appended, from which an interrupted search goes on.

The first line says what is searched; then comes one line for each finished piece [start, end) and one for each discovery. What
is missing is what no sound line covers: a damaged line, or one that a killed process did not finish, costs its piece and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treadle.collatz.append_only import AppendOnlyFile
from treadle.collatz.certificates import machine, sealed, unsealed
from treadle.collatz.ledger import joined
from treadle.errors import ConfigError

FORMAT = "treadle-collatz-search-1"


@dataclass
class Reading:
    """The sound entries of a log, and what is wrong with the rest."""

    header: dict[str, Any] | None = None
    entries: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[tuple[int, str]] = field(default_factory=list)  # line, reason
    torn: int = 0  # bytes after the last whole line
    sound: int = 0  # bytes up to there

    def pieces(self) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if entry["kind"] == "piece"]

    def covered(self) -> list[tuple[int, int]]:
        return joined((int(entry["start"]), int(entry["end"])) for entry in self.pieces())


def read(path: Path) -> Reading:
    """Every line checked by itself; ConfigError for a file that is no log of a search. A missing file is an empty log."""
    found = Reading()
    try:
        stream = open(path, "rb")
    except FileNotFoundError:
        return found
    except IsADirectoryError as problem:
        raise ConfigError(f"{path} is a folder; name the log, a .jsonl file, in it") from problem
    with stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                found.torn = len(line)
                break
            found.sound += len(line)
            try:
                entry = checked(line)
            except ValueError as problem:
                found.damaged.append((number, str(problem)))
                continue
            if entry["kind"] == "header":
                found.header = found.header or entry
            else:
                found.entries.append(entry)
    if found.header is None and (found.entries or found.damaged):
        raise ConfigError(f"{path} is not the log of a search (its first line should say what is searched); name another file with --log")
    return found


def checked(line: bytes) -> dict[str, Any]:
    """The entry of a line; ValueError says what is wrong with it."""
    entry = unsealed(line)
    kind = entry.get("kind")
    if kind == "header" and entry.get("format") != FORMAT:
        raise ValueError(f"it is of another format than {FORMAT}")
    if kind == "piece":
        try:
            if not int(entry["start"]) < int(entry["end"]):
                raise ValueError("its piece ends before it begins")
        except (KeyError, TypeError) as problem:
            raise ValueError("its piece has no start and end") from problem
    elif kind not in ("header", "discovery"):
        raise ValueError("it is neither a header nor a piece nor a discovery")
    return entry


class SearchLog:
    """A log that this process, and no other, appends to; `reading` is what was found in it."""

    def __init__(self, path: str | Path, about: dict[str, Any]) -> None:
        """about: what is searched; ConfigError when the log is about something else, RunLocked when another process writes."""
        self.path = Path(path)
        self._file = AppendOnlyFile(path, "log", "stop it, or write another log with --log")
        try:
            self.reading = read(self.path)
            self._begin(about)
        except BaseException:
            self.close()
            raise

    def _begin(self, about: dict[str, Any]) -> None:
        known = self.reading.header
        if known is not None and (other := {name: known.get(name) for name in about}) != about:
            raise ConfigError(f"{self.path} is the log of {_said(other)}, not of {_said(about)}; name another one with --log")
        if self.reading.torn:  # never trusted, and no line may follow it
            self._file.truncate(self.reading.sound)
        if known is None:
            self.append({"kind": "header", "format": FORMAT, **about, "machine": machine()})

    def append(self, entry: dict[str, Any]) -> None:
        """Durable when this returns: pieces take about a second each."""
        self._file.write(sealed(entry))
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> SearchLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Tail:
    """What another process appends to a log, as it comes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.position = 0

    def new(self) -> Iterator[dict[str, Any]]:
        """The sound entries whose lines have been finished since the last call."""
        try:
            stream = open(self.path, "rb")
        except FileNotFoundError:
            return
        with stream:
            stream.seek(self.position)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                self.position += len(line)
                try:
                    yield checked(line)
                except ValueError:  # said by the process that writes there, at its next start
                    continue


def _said(about: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in about.items())
