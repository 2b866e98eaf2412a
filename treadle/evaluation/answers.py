"""Answers of a model that are kept, so that an evaluation that was interrupted or is asked again goes on where it was.

One file a model: JSON lines, each with the digest of a question and its answer. A line that a kill cut short is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VERSION = 1  # of what an answer is; another number asks anew


class Answers:
    """Question -> answer, in a file or (None) nowhere."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.found = path, 0
        self._known: dict[str, Any] = {}
        self._broken = False  # the last line has no end
        if path is not None and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            self._broken = bool(text) and not text.endswith("\n")
            for line in text.splitlines():
                try:
                    entry = json.loads(line)
                    self._known[entry["asked"]] = entry["answer"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue

    @classmethod
    def of(cls, folder: Path, *identity: Any) -> Answers:
        """The file in `folder` for a model: identity is all that decides its answers."""
        digest = hashlib.sha256(json.dumps([VERSION, *identity], sort_keys=True).encode()).hexdigest()[:16]
        return cls(folder / f"{digest}.jsonl")

    def get(self, kind: str, question: Sequence[Any]) -> Any:
        """The answer to a question, or None."""
        answer = self._known.get(_digest(kind, question))
        self.found += answer is not None
        return answer

    def add(self, kind: str, question: Sequence[Any], answer: Any) -> None:
        """Keeps an answer, at once in the file; a question that is known keeps its first one."""
        digest = _digest(kind, question)
        if digest in self._known or self.path is None:
            return
        self._known[digest] = answer
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._broken + json.dumps({"asked": digest, "answer": answer}) + "\n")
        self._broken = False


def _digest(kind: str, question: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps([kind, *question], sort_keys=True).encode()).hexdigest()
