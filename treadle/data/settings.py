"""The [data] section."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from treadle.settings import Fallback, Settings, option
from treadle.storage.remote import is_url, refuse_secrets

TEXT = "text"  # data.dataset_class of prepared tokens

Packing = Literal["concat", "next_fit", "first_fit", "best_fit", "none"]


def _pack_sequences(value: Any) -> dict[str, Any]:
    if not isinstance(value, bool):
        raise ValueError
    return {} if value else {"data.packing": "none"}


def _only(train_on: str) -> Callable[[Any], dict[str, Any]]:
    """A switch of other trainers for what is learnt."""

    def translate(value: Any) -> dict[str, Any]:
        if not isinstance(value, bool):
            raise ValueError
        return {"data.train_on": train_on if value else Fallback("all")}

    return translate


def _validation_split(value: Any) -> dict[str, Any]:
    """A share, a split of a Hugging Face data set, or a text of its own."""
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return {} if value is None else {"data.validation_fraction": value}
    if not isinstance(value, str):
        raise ValueError
    return {"data.validation_path" if "/" in value or Path(value).suffix else "data.validation_split": value}


class DataSettings(Settings):
    """What is read."""

    path: str | list[str] | None = option(None, aliases=("data_path", "data_dir", "train_file"), change="guarded")
    """A .txt, .jsonl, .csv or .parquet file (the first three also .gz or .zst), a folder of them, a folder of prepared .bin
    shards, a URL of one of these (s3://, gs://, hf://, https://), or a list. The words `austen`, `conversations` and
    `preferences` are what ships with treadle."""

    dataset_class: str = option(TEXT, aliases=("dataset",), change="guarded")
    """What kind of data: text (the other keys here), conversations (messages, or prompt and completion), preferences (chosen and
    rejected), or FILE.py:CLASS, a treadle.Dataset of one's own with its keys in [task]."""

    chat_template: str = option("auto", aliases=("chat_template_path",), change="guarded")
    """How conversations are written: chatml, llama3, plain, a .jinja file, none (prompt and completion as they stand), or auto: the
    tokenizer's own template, plain where it has none."""

    train_on: Literal["assistant", "completion", "all"] = option("assistant", change="guarded")
    """The tokens of conversations that are learnt: all turns of the assistant, its last one (completion), or all."""

    streaming: bool = option(False, change="guarded")
    """Read and tokenise text while training instead of preparing it before: for text of any size. The run's length is then
    train.max_steps, since nobody knows how many rows there are."""

    dataset_name: str | None = option(None, change="guarded")
    """A Hugging Face data set: a name on the hub (downloaded by the `datasets` extra) or a local folder."""

    dataset_config: str | None = option(None, change="guarded")
    """The configuration of a Hugging Face data set."""

    split: str = option("train", aliases=("dataset_split",), change="guarded")
    """The split of a Hugging Face data set to train on."""

    text_column: str = option("text", change="guarded")
    """The column (JSON key) that holds the text of a .jsonl or .parquet row."""

    document_separator: str | None = option(None, change="guarded")
    """Splits each .txt file into documents at lines equal to this text; without it a file is one document."""

    transforms: list[str] = option([], change="guarded")
    """Functions FILE.py:FUNCTION (text -> text) that every document goes through, in order, before it is tokenised."""

    filters: list[str] = option([], change="guarded")
    """Functions FILE.py:FUNCTION (text -> true or false) that a document has to pass, after the transforms."""

    minimum_characters: int | None = option(None, change="guarded", ge=1)
    """Documents with fewer characters are left out (after the transforms)."""

    maximum_characters: int | None = option(None, change="guarded", ge=1)
    """Documents with more characters are left out (after the transforms)."""

    deduplicate: Literal["none", "exact", "near"] = option("none", change="guarded")
    """Leave out documents that were there before, in any of the paths: exact (the same text, white space aside) or near (a Jaccard
    similarity of .8 or more of their runs of five words). A pass over all of the text before the first step."""

    weights: list[float] | list[list[float]] | None = option(None, change="guarded")
    """One weight for each path: every 1024 rows hold exactly these shares. [[0, 9, 1], [10000, 5, 5]] changes them from
    step 10000 on. Without weights, rows are drawn from all paths in proportion to their size."""

    validation_path: str | None = option(None, aliases=("validation_file",), change="guarded")
    """Text to evaluate on; without it a part of the training text is held out."""

    validation_split: str | None = option(None, change="guarded")
    """The split of a Hugging Face data set to evaluate on (a number is read as validation_fraction)."""

    validation_fraction: float = option(0.05, change="guarded", ge=0.0, lt=1.0)
    """Share of the text held out: whole documents when there are 100 or more, else the end of each document."""

    test_fraction: float = option(0.0, change="guarded", ge=0.0, lt=1.0)
    """Share of the text held out beside it and seen by nobody until `treadle eval RUN --split test`."""

    max_samples: int | None = option(None, aliases=("max_documents",), change="guarded", ge=1)
    """Read this many documents of each path at most, the first ones."""

    seq_len: int = option(256, aliases=("max_length", "max_seq_len", "max_seq_length"), change="guarded", ge=2)
    """Tokens in a row."""

    min_length: int = option(0, change="guarded", ge=0)
    """Documents with fewer tokens are left out (counted in the statistics)."""

    packing: Packing = option(
        "concat", aliases=("packing_strategy",), change="guarded", spellings={"greedy": "next_fit", "false": "none"}
    )
    """How documents share rows: concat (cut wherever a row ends), next_fit, first_fit, best_fit (documents stay whole
    unless longer than a row), none (one document a row). Documents never see each other in any of them."""

    shuffle: bool = option(True, change="guarded")
    """Draw rows in an order that depends on the seed and the epoch; off: as they stand."""

    on_bad: Literal["skip", "error"] = option("skip", change="guarded")
    """What a malformed line does: skip (counted and reported, at most bad_limit of them) or error."""

    bad_limit: float = option(0.001, ge=0.0, le=1.0)
    """The largest share of malformed lines before preparation stops."""

    num_workers: int | Literal["auto"] = option("auto")
    """Processes that build batches; 0 is one background thread, auto measures the wait in the first 50 steps."""

    prefetch_factor: int = option(4, ge=1, le=1024)
    """Batches kept ready ahead of the step (for each worker)."""

    preparation_workers: int | Literal["auto"] = option("auto", aliases=("preprocessing_num_workers",))
    """Processes that tokenise during preparation; auto is one for each core."""

    cache_dir: str | None = option(None)
    """Where prepared data, trained tokenizers and parts of remote files are kept; default $TREADLE_CACHE or ~/.cache/treadle."""

    remote_cache_gb: float = option(20.0, ge=0.0)
    """Space on disk that parts of files read from URLs may take; what was read longest ago goes first. 0: nothing is kept."""

    translations: ClassVar[dict[str, Callable[[Any], dict[str, Any]]]] = {
        "pack_sequences": _pack_sequences,
        "assistant_only_loss": _only("assistant"),
        "completion_only_loss": _only("completion"),
        "validation_split": _validation_split,
    }
    switches: ClassVar[dict[str, tuple[str, ...]]] = {"pack_sequences": ("packing_strategy",)}

    @classmethod
    def in_our_words(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """Keys under their names, whatever other words for them were used."""
        names = {word: key for key in cls.model_fields for word in cls.key_info(key)["aliases"]}
        return {names.get(key, key): value for key, value in keys.items()}

    @field_validator("path")
    @classmethod
    def _several_paths(cls, path: str | list[str] | None) -> str | list[str] | None:
        """a.txt,b.jsonl as typed on a command line."""
        if not isinstance(path, str) or "," not in path or Path(path).exists():
            return path
        return [part.strip() for part in path.split(",") if part.strip()]

    @field_validator("path", "validation_path")
    @classmethod
    def _without_secrets(cls, path: str | list[str] | None) -> str | list[str] | None:
        for one in path if isinstance(path, list) else [path]:
            if is_url(one):
                refuse_secrets(str(one))
        return path

    @model_validator(mode="after")
    def _consistent(self) -> DataSettings:
        if self.path is not None and self.dataset_name is not None:
            raise ValueError("path and dataset_name are both given; keep one")
        if self.validation_split is not None and self.dataset_name is None:
            raise ValueError(f"validation_split = {self.validation_split!r} names a split of a Hugging Face data set, which "
                             "dataset_name would name; for a file: validation_path, for a share: validation_fraction")  # fmt: skip
        if (held := self.validation_fraction + self.test_fraction) >= 1:
            raise ValueError(f"validation_fraction and test_fraction hold out {held:g} of the text; leave some to train on")
        if self.weights is not None:
            paths = self.path if isinstance(self.path, list) else [self.path]
            from treadle.data.order import segments_of  # numpy: not for a section's help

            given = len(segments_of(self.weights)[0][1])
            if given != len(paths):
                raise ValueError(f"weights has {given} numbers for {len(paths)} path(s)")
        for name in ("num_workers", "preparation_workers"):
            if isinstance(getattr(self, name), int) and not 0 <= getattr(self, name) <= 256:
                raise ValueError(f"{name} must be auto or between 0 and 256")
        return self
