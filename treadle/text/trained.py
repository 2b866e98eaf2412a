"""Tokenizers of the `tokenizers` library: four kinds trained here, and any tokenizer.json from elsewhere.

The trained kinds all work on bytes written as printable characters (byte-level), so any text round-trips exactly and
no token is ever unknown.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treadle.errors import ConfigError, InputError
from treadle.text.base import Tokenizer, read_table, write_meta
from treadle.text.chat_template import CONFIG_FILE, Offsets
from treadle.text.words import WordCache

EOS_TOKEN = "<|endoftext|>"
MOST_TOKENS = 1 << 24  # fifty times the largest vocabulary in use
# What other projects call the token that ends a document, in order of preference.
EOS_NAMES = (EOS_TOKEN, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[SEP]", "<|eot_id|>")


@functools.cache
def byte_characters() -> dict[str, int]:
    """The byte-level alphabet (GPT-2): printable stand-in character -> byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    others = (b for b in range(256) if b not in set(printable))
    table.update({chr(256 + i): b for i, b in enumerate(others)})
    return table


class LibraryTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer`, trained here or read from a Hugging Face tokenizer.json."""

    kind = "huggingface"

    def __init__(self, inner: Any, eos_token: str) -> None:
        self.inner = inner
        inner.encode_special_tokens = True  # text that spells a special token is ordinary text
        inner.no_padding()
        inner.no_truncation()
        self.eos_token = eos_token
        self.config: dict[str, Any] = {}  # tokenizer_config.json, where there is one
        found = inner.token_to_id(eos_token)
        if found is None:
            raise ConfigError(f"the tokenizer has no token {eos_token!r} to end documents with")
        self._eos_id = found

    @classmethod
    def from_file(cls, path: str | Path, eos_token: str | None = None) -> LibraryTokenizer:
        """Of a tokenizer.json; InputError when it is none, or names no end of a document."""
        from tokenizers import Tokenizer as Inner

        try:
            inner = Inner.from_file(str(path))
        except Exception as problem:  # the library raises bare Exception
            raise InputError(f"{path} is not a tokenizer of the tokenizers library: {problem}") from None
        if eos_token is None:
            eos_token = next((name for name in EOS_NAMES if inner.token_to_id(name) is not None), None)
            if eos_token is None:
                raise InputError(f"{path} names no end-of-document token (looked for {', '.join(EOS_NAMES)})")
        return cls(inner, eos_token)

    @classmethod
    def from_folder(cls, folder: Path) -> LibraryTokenizer:
        """Of a folder of treadle's or of transformers'."""
        eos_token = None
        for name in ("treadle_tokenizer.json", CONFIG_FILE):
            if eos_token is None and (folder / name).is_file():
                found = read_table(folder / name).get("eos_token")
                found = found.get("content") if isinstance(found, dict) else found
                eos_token = found if isinstance(found, str) else None
        made = cls.from_file(folder / "tokenizer.json", eos_token)
        if (folder / CONFIG_FILE).is_file():
            made.config = {key: value for key, value in read_table(folder / CONFIG_FILE).items() if key != "auto_map"}
        return made

    @property
    def bos_id(self) -> int | None:
        """The one token that the tokenizer itself puts before a text, where it puts one."""
        ids = self.inner.encode("", add_special_tokens=True).ids
        return ids[0] if len(ids) == 1 and ids[0] in self._special_ids and ids[0] != self._eos_id else None

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id; InputError for more than 2^24."""
        # Ids may have holes, and an id is what an embedding is indexed by.
        size = max(self.inner.get_vocab(with_added_tokens=True).values()) + 1
        if size > MOST_TOKENS:
            raise InputError(f"the tokenizer has a token of id {size - 1}; ids end at {MOST_TOKENS - 1}, since tables of that "
                             "length are made of them")  # fmt: skip
        return size

    @property
    def eos_id(self) -> int:
        return self._eos_id

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.inner.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special) | {self._eos_id}

    @functools.cached_property
    def _layout(self) -> str:
        """How tokens spell bytes: byte-level stand-ins, SentencePiece's U+2581 and <0xNN>, WordPiece's ##, or plain."""
        decoder = str(json.loads(self.inner.to_str()).get("decoder"))
        for mark, layout in (("ByteLevel", "byte_level"), ("ByteFallback", "metaspace"), ("Metaspace", "metaspace"),
                             ("WordPiece", "wordpiece")):  # fmt: skip
            if mark in decoder:
                return layout
        return "plain"

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, index in self.inner.get_vocab(with_added_tokens=True).items():
            if index not in self._special_ids:
                lengths[index] = self._bytes_of(token)
        lengths[self._eos_id] = 1
        return lengths

    def _bytes_of(self, token: str) -> int:
        if self._layout == "byte_level" and all(c in byte_characters() for c in token):
            return len(token)
        if self._layout == "metaspace":
            if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
                return 1
            return len(token.replace("\u2581", " ").encode())
        if self._layout == "wordpiece":
            return len(token.removeprefix("##").encode()) + (0 if token.startswith("##") else 1)
        return len(token.encode())

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self.inner.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several texts, each int32 [N]."""
        if self._words is not None:
            return [self._words.encode(text) for text in texts]
        encoded = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(one.ids, dtype=np.int32) for one in encoded]

    @functools.cached_property
    def _words(self) -> WordCache | None:
        return WordCache.of(self.inner)

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        keep = [i for i in map(int, ids) if i not in self._special_ids and 0 <= i < self.vocab_size]
        if self._layout != "byte_level":
            return self.inner.decode(keep)
        table = byte_characters()
        raw = bytearray()
        for i in keep:
            token = self.inner.id_to_token(i) or ""
            raw += bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
        return raw.decode("utf-8", errors)

    @functools.cached_property
    def _reads_controls(self) -> Any:
        """A copy that reads control tokens from text; of its own, since other threads encode meanwhile."""
        copy = type(self.inner).from_str(self.inner.to_str())
        copy.encode_special_tokens = False
        return copy

    @functools.cached_property
    def control_tokens(self) -> dict[str, int]:
        return {token.content: i for i, token in self.inner.get_added_tokens_decoder().items() if token.special}

    @functools.cached_property
    def added_tokens(self) -> dict[str, int]:
        return {token.content: i for i, token in self.inner.get_added_tokens_decoder().items() if not token.special}

    @functools.cached_property
    def normalized_tokens(self) -> frozenset[str]:
        return frozenset(token.content for token in self.inner.get_added_tokens_decoder().values() if token.normalized)

    @functools.cached_property
    def _normalizing(self) -> tuple[Any, bool, bool]:
        """The normalizer, whether it leaves ASCII as it is, and whether the pre-tokenizer loses spaces, as BERT's does."""
        described = json.loads(self.inner.to_str()).get("normalizer") or {}
        steps = described.get("normalizers", []) if described.get("type") == "Sequence" else [described]
        keeps = all(step.get("type") in ("NFC", "NFD", "NFKC", "NFKD") for step in steps)
        splitter = self.inner.pre_tokenizer
        loses = splitter is not None and sum(len(word) for word, _ in splitter.pre_tokenize_str("a b")) < 3
        return self.inner.normalizer, keeps, loses

    def normalized(self, text: str) -> str:
        normalizer, keeps_ascii, loses_spaces = self._normalizing
        if normalizer is not None and not (keeps_ascii and text.isascii()):
            text = normalizer.normalize_str(text)
        return "".join(text.split()) if loses_spaces else text

    @property
    def named_tokens(self) -> dict[str, str]:
        found = {"eos_token": self.eos_token}
        for name, token in self.config.items():
            token = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(token, str):
                found[name] = token
        return found

    def encode_controlled(self, text: str, first: bool = True) -> tuple[list[int], Offsets]:
        if first or self._layout != "metaspace":
            encoded = self._reads_controls.encode(text, add_special_tokens=False)
            return encoded.ids, encoded.offsets
        # A text that goes on: without the space that such a tokenizer puts before a text.
        start = self._reads_controls.encode("\n", add_special_tokens=False).ids
        encoded = self._reads_controls.encode("\n" + text, add_special_tokens=False)
        if encoded.ids[: len(start)] != start:
            return self.encode_controlled(text)
        return encoded.ids[len(start) :], [(max(a - 1, 0), b - 1) for a, b in encoded.offsets[len(start) :]]

    def encode_rest(self, text: str) -> np.ndarray:
        return self._after_another(text) if self._layout == "metaspace" else self.encode(text)

    def _plain_ids(self, text: str) -> list[int]:
        """Without any added token: encode() would still read those that are not special."""
        text = text if self.inner.normalizer is None else self.inner.normalizer.normalize_str(text)
        words = [text] if self.inner.pre_tokenizer is None else [word for word, _ in self.inner.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in self.inner.model.tokenize(word)]

    def encode_literal(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are plain characters; InputError where that cannot be."""
        ids = self._plain_ids(text)
        if self._layout == "metaspace":  # it goes on a text: without the space that such a tokenizer puts before one
            start, after = self._plain_ids("\n"), self._plain_ids("\n" + text)
            ids = after[len(start) :] if after[: len(start)] == start else ids
        if {**self.added_tokens, **self.control_tokens}.get(text) in ids:
            raise InputError(f"a message says {text!r}, which this tokenizer cannot encode as ordinary text")
        return ids

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        write_meta(folder, self.kind, eos_token=self.eos_token)
        (folder / "tokenizer.json").write_text(self.inner.to_str(), encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.config, "eos_token": self.eos_token}
        if config["tokenizer_class"] == "TokenizersBackend":  # version 5's name for it, which 4 does not know
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.pop("chat_template", None)  # it stands in a file of its own, and may be another one by now
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        self.save_template(folder)

    def canonical(self) -> str:
        # Scores lose their last digits each time the library writes and reads them; nine digits stay.
        described = json.loads(self.inner.to_str(), parse_float=lambda digits: f"{float(digits):.9g}")
        return json.dumps(described, sort_keys=True) + self.eos_token


class _ByteLevelTrained(LibraryTokenizer):
    """What the four kinds trained here share: a byte-level alphabet, and EOS as the first id."""

    @classmethod
    def trained_on(cls, texts: Iterator[str], vocab_size: int) -> LibraryTokenizer:
        from tokenizers import Tokenizer as Inner
        from tokenizers import decoders, pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        if vocab_size < len(alphabet) + 1:
            raise ConfigError(f"tokenizer.vocab_size = {vocab_size}: at least {len(alphabet) + 1} (every byte and EOS)")
        model, trainer, splitter = cls._parts(vocab_size, alphabet)
        inner = Inner(model)
        inner.pre_tokenizer = splitter
        inner.decoder = decoders.ByteLevel()
        inner.train_from_iterator(texts, trainer)
        return cls(inner, EOS_TOKEN)

    @classmethod
    def _parts(cls, vocab_size: int, alphabet: list[str]) -> tuple[Any, Any, Any]:
        """(model, trainer, pre-tokenizer) of the kind."""
        raise NotImplementedError


def _common(vocab_size: int, alphabet: list[str]) -> dict[str, Any]:
    return {"vocab_size": vocab_size, "initial_alphabet": alphabet, "special_tokens": [EOS_TOKEN],
            "show_progress": False}  # fmt: skip


class BPETokenizer(_ByteLevelTrained):
    """Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) on bytes; the reproducible default."""

    kind = "bpe"

    @classmethod
    def _parts(cls, vocab_size: int, alphabet: list[str]) -> tuple[Any, Any, Any]:
        from tokenizers import models, pre_tokenizers, trainers

        trainer = trainers.BpeTrainer(**_common(vocab_size, alphabet))
        return models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False)


class WordPieceTokenizer(_ByteLevelTrained):
    """WordPiece's greedy longest match on bytes, with no continuation prefix, so that no byte is ever unknown."""

    kind = "wordpiece"

    @classmethod
    def _parts(cls, vocab_size: int, alphabet: list[str]) -> tuple[Any, Any, Any]:
        from tokenizers import models, pre_tokenizers, trainers

        # Longer words than max_input_chars_per_word would become one unknown token.
        model = models.WordPiece(unk_token=EOS_TOKEN, continuing_subword_prefix="", max_input_chars_per_word=2**31 - 1)
        trainer = trainers.WordPieceTrainer(continuing_subword_prefix="", **_common(vocab_size, alphabet))
        return model, trainer, pre_tokenizers.ByteLevel(add_prefix_space=False)


class UnigramTokenizer(_ByteLevelTrained):
    """Unigram language model (Kudo 2018, arXiv 1804.10959) on bytes."""

    kind = "unigram"

    @classmethod
    def _parts(cls, vocab_size: int, alphabet: list[str]) -> tuple[Any, Any, Any]:
        from tokenizers import models, pre_tokenizers, trainers

        trainer = trainers.UnigramTrainer(**_common(vocab_size, alphabet))
        return models.Unigram(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False)


class CharTokenizer(_ByteLevelTrained):
    """Characters: one token for each character of the training text, bytes for characters not seen there."""

    kind = "char"

    @classmethod
    def _parts(cls, vocab_size: int, alphabet: list[str]) -> tuple[Any, Any, Any]:
        from tokenizers import Regex, models, pre_tokenizers, trainers

        # Merges cannot cross the split, so a token is at most one character.
        splitter = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        return models.BPE(), trainers.BpeTrainer(**_common(vocab_size, alphabet)), splitter
