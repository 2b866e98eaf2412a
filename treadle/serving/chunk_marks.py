"""Where a hierarchical model begins its chunks, in characters of a text."""

from __future__ import annotations

import threading
from typing import Any

import torch

from treadle.data.batch import Batch
from treadle.serving.limits import RequestError
from treadle.text.base import Tokenizer


class ChunkMarks:
    """A model with `boundaries`, and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer, self._lock = model, tokenizer, threading.Lock()

    @staticmethod
    def of_model(model: Any, tokenizer: Tokenizer) -> ChunkMarks | None:
        """None for a model without chunks."""
        return ChunkMarks(model, tokenizer) if hasattr(model, "boundaries") else None

    def of(self, text: str, longest: int) -> list[list[int]]:
        """For each stage the offsets at which chunks begin, rising. RequestError 400 for more than `longest` tokens. One text at a
        time: it shares the machine with the engine."""
        ids = self._tokenizer.encode(text).tolist()
        if len(ids) > longest:
            raise RequestError(400, f"the text has {len(ids)} tokens; at most {longest}", "text")
        if not ids:
            return []
        with self._lock, torch.inference_mode():
            found = self._model.boundaries(Batch.from_ids(torch.tensor([ids]).to(self._model.device)))
        # A chunk may begin inside a character; it is shown where that character begins.
        return [sorted({len(self._tokenizer.decode(ids[:at]).rstrip("\ufffd")) for at in marks[0].nonzero()[:, 0].tolist()})
                for marks in found]  # fmt: skip
