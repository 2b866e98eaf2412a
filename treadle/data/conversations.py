"""Conversations to learn from: rows of messages become tokens with a mask, packed and isolated as documents are.

They go the way of text (prepared once, checksummed, in shards) with a mask beside the ids; a label that the mask leaves out is -100. A
conversation is never cut by a row: what is longer than one is cut after a message of the assistant, or left out, and counted.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from treadle.data.base import Dataset
from treadle.data.chosen_sources import held_shares, opened_sources, part_cache, prepared
from treadle.data.dataset import TokenDataset
from treadle.data.documents import Bad, Document, Encoded, Record
from treadle.data.messages import Said, said_in
from treadle.data.prepare import is_prepared, tokenizer_for
from treadle.data.shards import TokenSet
from treadle.data.sources import Piece, Source, WrappedSource, open_source
from treadle.errors import ConfigError, InputError, NothingLearnt
from treadle.files import cache_root
from treadle.text.base import Tokenizer
from treadle.text.chat_template import NAMED, ChatTemplate

if TYPE_CHECKING:
    from treadle.data.settings import DataSettings
    from treadle.text.settings import TokenizerSettings

VERSION = 6  # of what becomes of a row: another one prepares anew
CUT, TOO_LONG = "longer than a row, cut after a message of the assistant", "longer than a row, left out (a larger --seq_len keeps them)"
AUTO, NO_TEMPLATE = "auto", "none"


def template_of(settings: DataSettings, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template that the section asks for; None where prompt and completion are taken as they stand."""
    if settings.chat_template == NO_TEMPLATE:
        return None
    if settings.chat_template == AUTO:
        return tokenizer.chat_template or ChatTemplate.named("plain")
    return ChatTemplate.named(settings.chat_template)


def name_of(template: ChatTemplate | None) -> str:
    """What people call a template: its name, or that it is the tokenizer's own."""
    return NO_TEMPLATE if template is None else next((n for n, source in NAMED.items() if source == template.source), "the tokenizer's or a file's own")


class RowSource(WrappedSource):
    """Base of sources whose documents are made of another source's whole rows."""

    indivisible = True

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        inner: Any = source
        while inner is not None:
            inner.whole_rows = True
            inner = getattr(inner, "source", None)

    @abstractmethod
    def document(self, table: dict[str, Any], is_file: bool) -> Document:
        """What becomes of a row; InputError that says what is wrong with it. is_file: it is a whole file of text, not a row of one."""

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        """The documents made of each row; ConfigError for prepared tokens, which have none."""
        for row in self.source.read(piece):
            if is_file := isinstance(row, str):  # a file of text among them
                row = Record({self.column: row}, piece.files[0] if piece.files else "", None, 0)
            if not isinstance(row, (Record, Bad)):
                raise ConfigError("prepared tokens hold no conversations; give .jsonl or .parquet files of them")
            if isinstance(row, Bad):
                yield row
                continue
            try:
                yield self.document(row.table, is_file)
            except InputError as problem:
                yield row.bad(str(problem), ends=isinstance(problem, NothingLearnt))


class SpokenText(RowSource):
    """What is said in conversations, as text to train a tokenizer on."""

    def __init__(self, source: Source, words_in: Callable[[dict[str, Any]], list[Said]]) -> None:
        super().__init__(source)
        self.words_in = words_in

    def document(self, table: dict[str, Any], is_file: bool) -> Document:
        said = self.words_in(table)
        return "\n".join(str(m.get("content", "")) for one in said for m in one.messages or [{"content": one.text}])


class EncodedRows(RowSource):
    """Base of sources of tokens with a mask, encoded by a template (None: prompt and completion as they stand)."""

    def __init__(self, source: Source, tokenizer: Tokenizer, template: ChatTemplate | None, train_on: str, seq_len: int) -> None:
        super().__init__(source)
        self.tokenizer, self.template, self.train_on, self.seq_len = tokenizer, template, train_on, seq_len

    def identity(self) -> str:
        """A hash of the rows, the template and what is learnt."""
        template = self.template.source if self.template is not None else None
        described = [type(self).__name__, VERSION, self.source.identity(), template, self.train_on, self.seq_len, self.column]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def encode(self, said: Said, messages: Sequence[dict[str, Any]] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(ids [N], mask [N]) of what a row says, or of the first of its messages. InputError for messages without a
        template."""
        if said.messages is not None:
            if self.template is None:
                raise InputError("messages need a chat template; leave out --chat_template none")
            # Of a prompt with its completion, the completion is all that comes after the prompt; else it is the last turn.
            train_on = "assistant" if self.train_on == "completion" and said.given else self.train_on
            given = messages or said.messages
            made = self.template.encode(self.tokenizer, given, train_on, said.first_turn)
            if any(message.get("tool_calls") for message in given):
                self._refuse_unwritten_calls(given, made[0])
            return made
        prompt = self.tokenizer.encode(said.prompt)
        encode = self.tokenizer.encode_rest if said.prompt else self.tokenizer.encode
        rest = np.append(encode(said.text[len(said.prompt) :]), self.tokenizer.eos_id)
        mask = np.arange(len(prompt) + len(rest)) >= (0 if self.train_on == "all" else len(prompt))
        return np.concatenate([prompt, rest]).astype(np.int32), mask

    def _refuse_unwritten_calls(self, messages: Sequence[dict[str, Any]], ids: np.ndarray) -> None:
        """A model that learns from a template which leaves calls out learns to say nothing where it should call."""
        assert self.template is not None
        for number, message in enumerate(messages):
            if message.get("tool_calls"):
                silent = {key: value for key, value in message.items() if key != "tool_calls"}
                without = [*messages[:number], {"content": "", **silent}, *messages[number + 1 :]]
                try:
                    silent_ids = self.template.encode(self.tokenizer, without, "all")[0]
                except InputError:  # a template that fails without the call reads it
                    continue
                if np.array_equal(silent_ids, ids):
                    raise InputError(f"message {number + 1} has tool_calls, which the chat template does not write; take one that does "
                                     "(--chat_template FILE.jinja, or the model's own)")  # fmt: skip


class ConversationRows(EncodedRows):
    """A document for each conversation."""

    def document(self, table: dict[str, Any], is_file: bool) -> Document:
        said = said_in(table, self.column, self.template is not None)
        ids, mask = self.encode(said)
        if len(ids) > self.seq_len and not is_file:  # a file is cut into rows as text is
            return self._shortened(said)
        return Encoded(ids, mask, (len(ids),), said.remark)

    def _shortened(self, said: Said) -> Encoded:
        """The longest beginning that fits a row and ends with an answer, where there is one: completions and texts are whole or nothing."""
        messages = said.messages or []
        ends = [n for n in range(len(messages) - 1, said.given, -1) if messages[n - 1]["role"] == "assistant"]
        for end in ends if self.train_on != "completion" else []:
            ids, mask = self.encode(said, messages[:end])
            if len(ids) <= self.seq_len:
                return Encoded(ids, mask, (len(ids),), CUT)
        return Encoded.left_out(TOO_LONG)


class Conversations(TokenDataset):
    """Conversations in rows of `seq_len` tokens. Packing `concat`, which would cut them, is best_fit here."""

    reads_files = True
    encoded: ClassVar[type[EncodedRows]] = ConversationRows

    def __init__(self, sets: Sequence[TokenSet], tokenizer: Tokenizer, seq_len: int, packing: str = "best_fit", *rest: Any, **more: Any) -> None:
        super().__init__(sets, tokenizer, seq_len, "best_fit" if packing == "concat" else packing, *rest, **more)

    @classmethod
    def said(cls, table: dict[str, Any], column: str) -> list[Said]:
        """All that a row says, for a tokenizer that is trained on it."""
        return [said_in(table, column, True)]

    @classmethod
    def splits(cls, data: DataSettings, task: Any, seed: int) -> dict[str, Dataset]:
        from treadle.text.settings import TokenizerSettings

        return cls.splits_with(data, task, seed, TokenizerSettings(), None)

    @classmethod
    def splits_with(
        cls, data: DataSettings, task: Any, seed: int, tokenizer_settings: TokenizerSettings, tokenizer: Tokenizer | None,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Dataset]:  # fmt: skip
        _check(data)
        sources, root = _opened(data), cache_root(data.cache_dir)
        if tokenizer is None:
            spoken = SpokenText(sources[0], lambda table: cls.said(table, data.text_column))
            tokenizer = tokenizer_for(spoken, tokenizer_settings.name, tokenizer_settings.vocab_size, root=root, held=held_shares(data),
                                      limit=tokenizer_settings.train_bytes)  # fmt: skip
        template = template_of(data, tokenizer)
        if template is not None:
            tokenizer.chat_template = template
        made = [cls.encoded(source, tokenizer, template, data.train_on, data.seq_len) for source in sources]
        sets = [prepared(data, source, tokenizer, held_shares(data), progress) for source in made]
        held = {name: [one[name] for one in sets if name in one] for name in ("validation", "test")}
        if data.validation_path is not None:
            other = open_source(data.validation_path, data.text_column, cache=part_cache(data))
            held["validation"] = [prepared(data, cls.encoded(other, tokenizer, template, data.train_on, data.seq_len), tokenizer)["train"]]
        names = data.path if isinstance(data.path, list) else ()
        splits: dict[str, Dataset] = {
            "train": cls([one["train"] for one in sets], tokenizer, data.seq_len, data.packing, data.weights, data.shuffle, names)
        }
        for name, some in held.items():
            if some:
                splits[name] = cls(some, tokenizer, data.seq_len, data.packing, None, data.shuffle)
        return splits

    def stats(self) -> dict[str, Any]:
        """Those of text, how many tokens are learnt, and remarks on documents with their numbers."""
        learnt = sum(int(np.asarray(shard.learnt).sum()) for tokens in self.sets for shard in tokens.shards if shard.learnt is not None)
        return {**super().stats(), "learnt": learnt, "remarks": self.remarks()}

    def remarks(self) -> dict[str, int]:
        """What became of rows that did not fit as they were, counted over all splits."""
        found: dict[str, int] = {}
        for tokens in self.sets:
            for remark, count in tokens.statistics.get("remarks", {}).items():
                found[remark] = found.get(remark, 0) + count
        return found

    def describe(self) -> str:
        stats = self.stats()
        notes = "".join(f"; {count:,} {remark}" for remark, count in stats["remarks"].items())
        return (f"{self.counted(stats['documents'])}, {stats['tokens']:,} tokens of which {stats['learnt']:,} are learnt, {stats['rows']:,} rows "
                f"of {stats['row_length']}, chat template {name_of(self.tokenizer.chat_template)}{notes}")  # fmt: skip

    def prompts(self, count: int) -> list[list[int]]:
        """What comes before the first learnt token of the first `count` documents that begin with such a part."""
        found: list[list[int]] = []
        for shard in (shard for tokens in self.sets for shard in tokens.shards):
            for start, end in zip(shard.document_starts.tolist(), [*shard.document_starts[1:].tolist(), len(shard.ids)]):
                if len(found) == count:
                    return found
                before = int(np.argmax(np.asarray(shard.learnt[start:end])))
                if before:
                    found.append(np.asarray(shard.ids[start : start + before], dtype=np.int64).tolist())
        return found

    def counted(self, documents: int) -> str:
        """How many conversations, in words."""
        return f"{documents:,} conversation(s)"


def _opened(data: DataSettings) -> list[Source]:
    if data.dataset_name is not None:
        from treadle.data.huggingface_source import HuggingFaceSource

        return [HuggingFaceSource(data.dataset_name, data.dataset_config, data.split, "", data.max_samples)]
    if data.path is None:
        raise InputError("no conversations: give a file of them (treadle train FILE.jsonl --objective sft) or --data.path")
    return opened_sources(data)


def _check(data: DataSettings) -> None:
    """ConfigError for keys of text that have no meaning for conversations."""
    for key in ("streaming", "transforms", "filters", "minimum_characters", "maximum_characters", "validation_split", "document_separator"):
        if getattr(data, key):
            raise ConfigError(f"data.{key} is for text; conversations are read without it, so leave it out")
    if data.deduplicate != "none":
        raise ConfigError("data.deduplicate is for text; conversations are read without it, so leave it out")
    for path in data.path if isinstance(data.path, list) else [data.path]:
        if path is not None and is_prepared(path):
            raise ConfigError(f"{path} holds prepared text; conversations are prepared where they are read: give the .jsonl or .parquet file")
