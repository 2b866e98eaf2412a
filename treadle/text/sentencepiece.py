"""SentencePiece .model files (Kudo and Richardson 2018), through the library of that name."""

from __future__ import annotations

import base64
import functools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from treadle.errors import ConfigError, InputError, MissingExtra
from treadle.text.base import Tokenizer, write_meta

MODEL_FILE = "tokenizer.model"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; U+2581 counts as one space byte, <0xNN> as one byte."""

    kind = "sentencepiece"

    def __init__(self, serialized: bytes) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise MissingExtra("a SentencePiece tokenizer", "sentencepiece") from None
        self.serialized = serialized
        try:
            self.inner = sentencepiece.SentencePieceProcessor(model_proto=serialized)
        except (RuntimeError, TypeError) as problem:
            raise InputError(f"not a SentencePiece model: {problem}") from None
        if self.inner.eos_id() < 0:
            raise ConfigError("the SentencePiece model has no end-of-sentence token to end documents with")

    @classmethod
    def from_file(cls, path: str | Path) -> SentencePieceTokenizer:
        """Of a .model file; InputError when it cannot be read."""
        try:
            return cls(Path(path).read_bytes())
        except OSError as problem:
            raise InputError(f"{path} cannot be read: {problem}") from None

    @classmethod
    def from_folder(cls, folder: Path) -> SentencePieceTokenizer:
        """Of a folder that `save` wrote."""
        return cls.from_file(folder / MODEL_FILE)

    @property
    def vocab_size(self) -> int:
        return self.inner.get_piece_size()

    @property
    def eos_id(self) -> int:
        return self.inner.eos_id()

    @property
    def bos_id(self) -> int | None:
        return self.inner.bos_id() if self.inner.bos_id() >= 0 else None

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for i in range(self.vocab_size):
            if self.inner.is_byte(i):
                lengths[i] = 1
            elif not self.inner.is_control(i) and not self.inner.is_unknown(i):
                lengths[i] = len(self.inner.id_to_piece(i).replace("\u2581", " ").encode())
        lengths[self.eos_id] = 1
        return lengths

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self.inner.encode(text), dtype=np.int32)

    def normalized(self, text: str) -> str:
        return self.inner.normalize(text)

    def encode_rest(self, text: str) -> np.ndarray:
        return self._after_another(text)

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        keep = [i for i in map(int, ids) if 0 <= i < self.vocab_size and not self.inner.is_control(i)]
        return self.inner.decode(keep)

    @functools.cached_property
    def control_tokens(self) -> dict[str, int]:
        return {self.inner.id_to_piece(i): i for i in range(self.vocab_size) if self.inner.is_control(i)}

    @property
    def named_tokens(self) -> dict[str, str]:
        named = {"eos_token": self.eos_id, "bos_token": self.bos_id}
        return {name: self.inner.id_to_piece(i) for name, i in named.items() if i is not None}

    def save(self, folder: str | Path) -> None:
        write_meta(Path(folder), self.kind)
        (Path(folder) / MODEL_FILE).write_bytes(self.serialized)
        self.save_template(folder)

    def canonical(self) -> str:
        return base64.b64encode(self.serialized).decode()
