"""Bytes as tokens: 256 ids, nothing to train. BOS 254 and EOS 255 are bytes that UTF-8 never uses."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from treadle.text.base import Tokenizer, write_meta

BOS, EOS = 254, 255
EOS_TOKEN = "<|endoftext|>"  # how a chat template spells it


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes; every text round-trips exactly."""

    kind = "byte"

    @classmethod
    def from_folder(cls, folder: Path) -> ByteTokenizer:
        """There is nothing to read."""
        return cls()

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def eos_id(self) -> int:
        return EOS

    @property
    def bos_id(self) -> int | None:
        return BOS

    @property
    def byte_lengths(self) -> np.ndarray:
        lengths = np.ones(256, dtype=np.int32)
        lengths[BOS] = 0
        return lengths

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        return bytes(i for i in map(int, ids) if 0 <= i < BOS).decode("utf-8", errors)

    @property
    def control_tokens(self) -> dict[str, int]:
        return {EOS_TOKEN: EOS}

    @property
    def named_tokens(self) -> dict[str, str]:
        return {"eos_token": EOS_TOKEN}

    def save(self, folder: str | Path) -> None:
        write_meta(Path(folder), self.kind)
        self.save_template(folder)

    def canonical(self) -> str:
        return "utf-8 bytes, BOS 254, EOS 255"
