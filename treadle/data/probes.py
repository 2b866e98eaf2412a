"""Rows that probe what a sequence model recalls: copy, associative recall, induction. `--dataset probe --probe copy`.

Only the positions whose answer stands in the row have labels, so the accuracy of next-token training is the probe's score: 1 is
perfect recall, 1 / symbols is chance.

- copy: a random string, a separator, the string again (Jelassi et al. 2024, arXiv 2402.01032).
- associative_recall: keys each followed by a value, then all the keys again in another order, each to be answered with its value
  (multi-query recall; Arora et al. 2023, arXiv 2312.04927).
- induction: a string of different symbols, of another length in every row, over and over; from the first repetition on the symbol
  after the current one's last occurrence is asked for (Olsson et al. 2022, arXiv 2209.11895).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch

from treadle.data.batch import IGNORE, Batch
from treadle.data.generated import GeneratedDataset
from treadle.errors import ConfigError
from treadle.settings import Settings, option

Probe = Literal["copy", "associative_recall", "induction"]
PROBES: tuple[str, ...] = get_args(Probe)
SEPARATOR = 0  # the other symbols are 1 to probe_symbols


class ProbeKeys(Settings):
    """Which recall is probed, and how much of it a row asks for."""

    called: ClassVar[str] = "probe"

    probe: Probe = option("copy", change="fixed")
    """copy, associative_recall or induction."""

    probe_length: int = option(16, change="fixed", ge=2)
    """Symbols to copy, pairs to recall, or the longest string that is repeated; a row has about twice (pairs: four times) as many."""

    probe_symbols: int = option(63, change="fixed", ge=4)
    """Different symbols; chance is one of so many. Keys and values of pairs share them half and half."""


class Probes(GeneratedDataset):
    """Row n is a pure function of (seed, n), as of every generated dataset."""

    Config = ProbeKeys
    name = "probe"
    task: ProbeKeys
    evaluation_rows = 256

    def __init__(self, task: Any = None, seed: int = 0, split: str = "train", seq_len: int | None = None) -> None:
        super().__init__(task, seed, split)
        most = self.task.probe_symbols // 2 if self.task.probe == "associative_recall" else self.task.probe_symbols
        if self.task.probe != "copy" and self.task.probe_length > most:
            raise ConfigError(f"task.probe_length = {self.task.probe_length}: {self.task.probe} with {self.task.probe_symbols} symbols has "
                              f"at most {most} different ones; type --probe_length {most}, or more --probe_symbols")  # fmt: skip
        self.seq_len = {"copy": 2, "associative_recall": 4, "induction": 2}[self.task.probe] * self.task.probe_length

    def model_keys(self) -> dict[str, Any]:
        return {"vocab_size": self.task.probe_symbols + 1}

    def generate(self, rows: np.ndarray) -> Batch:
        """input_ids and labels [B, seq_len] int64; IGNORE where nothing is asked."""
        made = [getattr(self, f"_{self.task.probe}")(self.random(int(row))) for row in rows]
        whole = torch.from_numpy(np.stack([tokens for tokens, _ in made]))
        asked = torch.from_numpy(np.stack([asked for _, asked in made]))
        labels = torch.where(asked[:, 1:], whole[:, 1:], torch.full_like(whole[:, 1:], IGNORE))
        return Batch.from_ids(whole[:, :-1].contiguous(), labels=labels)

    # Each gives seq_len + 1 tokens and which of them are asked for.

    def _copy(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        length = self.task.probe_length
        text = random.integers(1, self.task.probe_symbols + 1, length)
        return np.concatenate([text, [SEPARATOR], text]), np.arange(2 * length + 1) > length

    def _associative_recall(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        pairs, half = self.task.probe_length, self.task.probe_symbols // 2
        keys = 1 + random.permutation(half)[:pairs]
        values = 1 + half + random.integers(0, self.task.probe_symbols - half, pairs)
        again = random.permutation(pairs)
        shown, asked = np.stack([keys, values], 1).ravel(), np.stack([keys[again], values[again]], 1).ravel()
        where = np.zeros(4 * pairs + 1, dtype=bool)
        where[2 * pairs + 2 :: 2] = True
        return np.concatenate([[SEPARATOR], shown, asked]), where

    def _induction(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        longest = self.task.probe_length
        period = int(random.integers((longest + 1) // 2, longest + 1))
        text = 1 + random.permutation(self.task.probe_symbols)[:period]
        places = np.arange(2 * longest + 1)
        return text[places % period], places > period
