"""What a tokenizer is to the rest of treadle, and the one way to load, train and save one."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treadle.errors import ConfigError, InputError
from treadle.registry import Registry, nearest
from treadle.text.chat_template import ChatTemplate, Offsets

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
    chat_template: ChatTemplate | None = None  # how a conversation is written; of its folder, or given to the run

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
        """Ids of several texts, each int32 [N]."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Ids -> text; specials are left out. errors="strict" raises UnicodeDecodeError on a broken character."""

    @property
    def control_tokens(self) -> dict[str, int]:
        """Spelling -> id of the tokens that a chat template may write and a text never becomes."""
        return {}

    @property
    def added_tokens(self) -> dict[str, int]:
        """Spelling -> id of tokens added to the vocabulary that are read from every text."""
        return {}

    @property
    def named_tokens(self) -> dict[str, str]:
        """The names under which chat templates know control tokens: eos_token, bos_token, ..."""
        return {}

    @property
    def normalized_tokens(self) -> frozenset[str]:
        """Those of control_tokens and added_tokens that are looked for in the normalised text: spellings that normalise to one are it."""
        return frozenset()

    def normalized(self, text: str) -> str:
        """The text as the vocabulary sees it, where a tokenizer changes case, width or the like first: equal texts have equal ids."""
        return text

    def encode_controlled(self, text: str, first: bool = True) -> tuple[list[int], Offsets]:
        """A text in which control tokens are spelled -> ids, and of each the characters (start, end) it stands for.

        first: the text begins here. Raises ConfigError for a tokenizer of which nobody can tell what its tokens stand for.
        """
        spelled = "|".join(map(re.escape, sorted(self.control_tokens, key=len, reverse=True)))
        ids: list[int] = []
        offsets: Offsets = []
        at = 0
        for piece in re.split(f"({spelled})", text) if spelled else [text]:
            if piece in self.control_tokens:
                new, places = [self.control_tokens[piece]], [(0, len(piece))]
            else:
                new = self.encode(piece).tolist() if piece else []
                places = self._places(piece, new)
            ids, offsets = ids + new, offsets + [(at + a, at + b) for a, b in places]
            at += len(piece)
        return ids, offsets

    def encode_literal(self, text: str) -> list[int]:
        """A spelled control token as the ordinary text that it is."""
        return self.encode(text).tolist()

    def encode_rest(self, text: str) -> np.ndarray:
        """Ids int32 of a text that goes on another: without the space that some tokenizers put before a text."""
        return self.encode(text)

    def _after_another(self, text: str) -> np.ndarray:
        """`encode_rest` of a tokenizer that puts a space before a text: what comes after a character that stays by itself."""
        for before in ("\n", "\x01", "0"):
            start, whole = self.encode(before), self.encode(before + text)
            if np.array_equal(whole[: len(start)], start):
                return whole[len(start) :]
        return self.encode(text)

    def _places(self, text: str, ids: list[int]) -> Offsets:
        """The characters each id stands for, by the bytes it stands for."""
        ends = np.cumsum(self.byte_lengths[ids]) if ids else np.zeros(0, dtype=np.int64)
        characters = np.repeat(np.arange(len(text)), [len(c.encode()) for c in text]) if text else np.zeros(0, dtype=np.int64)
        more = (int(ends[-1]) if len(ends) else 0) - len(characters)
        if more not in (0, 1):  # 1: a space that SentencePiece puts before a text
            raise ConfigError(f"a {self.kind} tokenizer does not keep a text byte for byte, so chat templates cannot be masked with it")
        starts = np.concatenate([[0], ends[:-1]]) if ids else ends
        last = len(characters) - 1
        return [(int(characters[min(max(a - more, 0), last)]), int(characters[max(b - more - 1, 0)]) + 1) if b - more > 0 else (0, 0)
                for a, b in zip(starts.tolist(), ends.tolist())]  # fmt: skip

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer into a folder that `Tokenizer.load` reads."""

    @abstractmethod
    def canonical(self) -> str:
        """A text that is equal for equal tokenizers; the fingerprint is its hash."""

    def fingerprint(self) -> str:
        """A hash of all that decides ids: equal fingerprints encode alike."""
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
            made = Tokenizer._of_folder(path)
            made.chat_template = ChatTemplate.of_folder(path)
            return made
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
    def _of_folder(path: Path) -> Tokenizer:
        if (path / META_FILE).is_file():
            return TOKENIZERS.get(str(read_table(path / META_FILE).get("kind"))).from_folder(path)
        if (path / "tokenizer.json").is_file():
            return TOKENIZERS.get("huggingface").from_folder(path)
        models = sorted(path.glob("*.model"))
        if models:
            return TOKENIZERS.get("sentencepiece").from_file(models[0])
        raise InputError(f"{path} holds no tokenizer.json, no *.model and no {META_FILE}")

    def save_template(self, folder: str | Path) -> None:
        """Writes the chat template, where there is one, beside the tokenizer."""
        if self.chat_template is not None:
            self.chat_template.save(folder)

    @staticmethod
    def train(kind: str, texts: Iterator[str], vocab_size: int) -> Tokenizer:
        """Trains a bpe, wordpiece, unigram or char tokenizer on an iterator of texts. ConfigError for any other kind."""
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
    """Says in a folder which kind of tokenizer it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / META_FILE).write_text(json.dumps({"kind": kind, **extra}, indent=1) + "\n", encoding="utf-8")
