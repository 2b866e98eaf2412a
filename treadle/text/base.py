"""What a tokenizer is to the rest of treadle, and the one way to load, train and save one."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treadle.errors import ConfigError, InputError
from treadle.registry import Registry, nearest

META_FILE = "treadle_tokenizer.json"

TOKENIZERS = Registry(
    "tokenizer",
    {
        "byte": "treadle.text.byte:ByteTokenizer",
        "bpe": "treadle.text.trained:BPETokenizer",
        "wordpiece": "treadle.text.trained:WordPieceTokenizer",
        "unigram": "treadle.text.trained:UnigramTokenizer",
        "char": "treadle.text.trained:CharTokenizer",
        "huggingface": "treadle.text.trained:LibraryTokenizer",
        "sentencepiece": "treadle.text.sentencepiece:SentencePieceTokenizer",
    },
    aliases={"bytes": "byte", "hf": "huggingface", "character": "char"},
    base="treadle.text.base:Tokenizer",
)
TRAINABLE = ("bpe", "wordpiece", "unigram", "char")


class Tokenizer(ABC):
    """Text <-> ids. Special tokens are never read from text and never shown in it."""

    kind: str
    prompt_start: tuple[int, ...] = ()  # what a model from elsewhere expects before every prompt

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, specials included."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """The end-of-document token; every document ends with one."""

    @property
    def bos_id(self) -> int | None:
        """The begin-of-document token, where there is one."""
        return None

    @property
    def start_id(self) -> int:
        """The token generation starts from without a prompt: a document follows the end of the one before."""
        return self.eos_id

    def prompt_ids(self, text: str) -> list[int]:
        """What generation starts from: the prompt's tokens, or the token before any text."""
        return [*self.prompt_start, *self.encode(text).tolist()] or [self.start_id]

    @property
    @abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """int32 [V]: UTF-8 bytes each id stands for; 1 for the end-of-document token, 0 for other specials."""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Text -> int32 ids [N], without specials."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Ids -> text; specials are left out. errors="strict" raises UnicodeDecodeError on a broken character."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer into a folder that `Tokenizer.load` reads."""

    @abstractmethod
    def canonical(self) -> str:
        """A text that is equal for equal tokenizers; the fingerprint is its hash."""

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.kind}\n{self.canonical()}".encode()).hexdigest()

    @staticmethod
    def load(source: str | Path) -> Tokenizer:
        """ "byte", a tokenizer folder (ours, a run's, Hugging Face's), a tokenizer.json, or a SentencePiece .model.

        Raises InputError for a name with no local file: nothing is downloaded and nothing is guessed.
        """
        name, path = str(source), Path(source)
        if name.lower() in ("byte", "bytes"):
            return TOKENIZERS.get("byte")()
        if path.is_dir():
            if (path / META_FILE).is_file():
                return TOKENIZERS.get(str(read_table(path / META_FILE).get("kind"))).from_folder(path)
            if (path / "tokenizer.json").is_file():
                return TOKENIZERS.get("huggingface").from_folder(path)
            models = sorted(path.glob("*.model"))
            if models:
                return TOKENIZERS.get("sentencepiece").from_file(models[0])
            raise InputError(f"{path} holds no tokenizer.json, no *.model and no {META_FILE}")
        if path.is_file():
            if path.suffix == ".model":
                return TOKENIZERS.get("sentencepiece").from_file(path)
            return TOKENIZERS.get("huggingface").from_file(path)
        hint = nearest(name, TOKENIZERS.names())
        raise InputError(
            f"tokenizer {name!r} is no local folder or file ({hint}); "
            f"train one with `treadle tokenizer train FILE --kind bpe --output {path.name or 'tokenizer'}`"
        )

    @staticmethod
    def train(kind: str, texts: Iterator[str], vocab_size: int) -> Tokenizer:
        """Trains a bpe, wordpiece, unigram or char tokenizer on an iterator of texts."""
        kind = TOKENIZERS.canonical(kind)
        if kind not in TRAINABLE:
            raise ConfigError(f"a {kind} tokenizer is not trained; trainable: {', '.join(TRAINABLE)}")
        return TOKENIZERS.get(kind).trained_on(texts, vocab_size)


def read_table(path: Path, largest: int | None = None) -> dict[str, Any]:
    """A JSON file of a tokenizer's or a model's folder; InputError when it is no table, or has more bytes than `largest`."""
    try:
        if largest is not None and path.stat().st_size > largest:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise InputError(f"{path} cannot be read: {problem}") from None
    if not isinstance(table, dict):
        raise InputError(f"{path} holds no table")
    return table


def write_meta(folder: Path, kind: str, **extra: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / META_FILE).write_text(json.dumps({"kind": kind, **extra}, indent=1) + "\n", encoding="utf-8")
