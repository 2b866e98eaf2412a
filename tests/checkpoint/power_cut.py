"""A model of a disk that loses power: every state that a weak file system may leave behind a writer.

The writer's system calls are recorded; after each of them the disk may hold, of every file, only what was fsynced, or
half of the rest, or all of it (or zeros in its place); and of every directory only the entries fsynced, plus any subset
of the pending ones. Idea after CrashMonkey (Mohan et al., OSDI 2018) and ALICE (Pillai et al., OSDI 2014).
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class RecordingOs:
    """Stands in for the `os` module inside the writer: performs every call and writes it down."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, ...]] = []
        self._open: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, *rest: Any) -> int:
        new = not os.path.exists(path)
        descriptor = os.open(path, flags, *rest)
        self._open[descriptor] = str(path)
        if flags & os.O_CREAT and new:
            self.operations.append(("create", str(path)))
        return descriptor

    def write(self, descriptor: int, data: Any) -> int:
        count = os.write(descriptor, data)
        self.operations.append(("write", self._open[descriptor], bytes(data[:count])))
        return count

    def fsync(self, descriptor: int) -> None:
        path = self._open[descriptor]
        self.operations.append(("sync_directory" if os.path.isdir(path) else "sync_file", path))

    def close(self, descriptor: int) -> None:
        self._open.pop(descriptor, None)
        os.close(descriptor)

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new)
        self.operations.append(("rename", str(old), str(new)))

    def mkdir(self, path: str) -> None:
        os.mkdir(path)
        self.operations.append(("mkdir", str(path)))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        os.makedirs(path, exist_ok=exist_ok)  # only ever the root, which exists

    def unlink(self, path: str) -> None:
        os.unlink(path)
        self.operations.append(("unlink", str(path)))

    def rmdir(self, path: str) -> None:
        os.rmdir(path)
        self.operations.append(("unlink", str(path)))


class Disk:
    """Directories and files by number; `pending` are directory changes that no fsync has made certain."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.numbers = itertools.count(1)
        self.live: dict[int, dict[str, int]] = {0: {}}  # what the running system sees
        self.certain: dict[int, dict[str, int]] = {0: {}}
        self.pending: list[list[tuple[int, str, int | None]]] = []
        self.data: dict[int, bytes] = {}
        self.synced: dict[int, int] = {}

    def _place(self, path: str) -> tuple[int, str]:
        *folders, name = os.path.relpath(path, self.root).split(os.sep)
        at = 0
        for folder in folders:
            at = self.live[at][folder]
        return at, name

    def _number(self, path: str) -> int:
        if Path(path) == self.root:
            return 0
        at, name = self._place(path)
        return self.live[at][name]

    def do(self, operation: tuple[Any, ...]) -> None:
        kind, path = operation[0], operation[1]
        if kind in ("create", "mkdir"):
            at, name = self._place(path)
            number = next(self.numbers)
            if kind == "mkdir":
                self.live[number], self.certain[number] = {}, {}
            else:
                self.data[number], self.synced[number] = b"", 0
            self.live[at][name] = number
            self.pending.append([(at, name, number)])
        elif kind == "write":
            self.data[self._number(path)] += operation[2]
        elif kind == "sync_file":
            number = self._number(path)
            self.synced[number] = len(self.data[number])
        elif kind == "sync_directory":
            number = self._number(path)
            for change in [c for c in self.pending if any(at == number for at, _, _ in c)]:
                self._apply(change, self.certain)
                self.pending.remove(change)
        elif kind == "rename":
            (old_at, old), (new_at, new) = self._place(path), self._place(operation[2])
            number = self.live[old_at].pop(old)
            self.live[new_at][new] = number
            self.pending.append([(new_at, new, number), (old_at, old, None)])
        elif kind == "unlink":
            at, name = self._place(path)
            self.live[at].pop(name)
            self.pending.append([(at, name, None)])

    @staticmethod
    def _apply(change: list[tuple[int, str, int | None]], folders: dict[int, dict[str, int]]) -> None:
        for at, name, number in change:
            if number is None:
                folders[at].pop(name, None)
            else:
                folders[at][name] = number

    def states(self, dice: random.Random, limit: int) -> Iterator[tuple[dict, dict]]:
        """(directories, file contents) that a power cut now may leave."""
        count = len(self.pending)
        if count <= 6:
            choices = list(itertools.product((False, True), repeat=count))
        else:
            choices = [tuple(dice.random() < 0.5 for _ in range(count)) for _ in range(limit)]
            choices += [(False,) * count, (True,) * count]
        for chosen in choices[: limit + 2]:
            folders = {number: dict(entries) for number, entries in self.certain.items()}
            for change, kept in zip(self.pending, chosen):
                if kept:
                    self._apply(change, folders)
            for mode in ("lost", "half", "whole", "zeros"):
                contents = {}
                for number, data in self.data.items():
                    sure, rest = self.synced[number], len(data) - self.synced[number]
                    tail = {
                        "lost": b"",
                        "half": data[sure : sure + rest // 2],
                        "whole": data[sure:],
                        "zeros": b"\0" * rest,
                    }
                    contents[number] = data[:sure] + tail[mode]
                yield folders, contents

    def write_out(self, folders: dict, contents: dict, path: Path, at: int = 0) -> None:
        """Makes the state real at `path`."""
        path.mkdir(parents=True, exist_ok=True)
        for name, number in folders[at].items():
            if number in folders:
                self.write_out(folders, contents, path / name, number)
            else:
                (path / name).write_bytes(contents[number])
