"""The tokenizer inside a .gguf file <-> the tokenizer files of a Hugging Face folder; byte-level BPE alone.

llama.cpp knows how to cut a text into words by a name (tokenizer.ggml.pre), Hugging Face by a description (pre_tokenizer of
tokenizer.json). PRE has both, so that either side's ids are the other's. What it does not know is refused, never guessed: a
wrong cut gives other ids and a worse model without any error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from treadle.errors import ConfigError, InputError
from treadle.settings import shown
from treadle.text.base import META_FILE, Tokenizer
from treadle.text.byte import BOS, EOS
from treadle.text.trained import LibraryTokenizer, byte_characters

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # tokenizer.ggml.token_type, as llama.cpp numbers them

_BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_PLAIN_BYTES = {**_BYTES, "use_regex": False}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


_END = r"[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
# llama.cpp's name -> the steps of Hugging Face's pre_tokenizer (src/llama-vocab.cpp of llama.cpp has the same expressions).
PRE: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
    "llama-bpe": [_split(rf"{_WORDS}\p{{N}}{{1,3}}| ?{_END}"), _PLAIN_BYTES],
    "qwen2": [_split(rf"{_WORDS}\p{{N}}| ?{_END}"), _PLAIN_BYTES],
}
NEVER = "\u00fe \u00ff"  # llama.cpp wants a merge; these stand for the bytes FE and FF, which no text in UTF-8 has


# ---- reading ----


def files_of(metadata: Mapping[str, Any], place: str) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and, where there is one, chat_template.jinja, from a file's tokenizer.* keys.
    InputError for another kind of tokenizer than byte-level BPE, or another cut into words than those of PRE."""
    own = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    kind, cut = own.get("model"), own.get("pre", "gpt-2")
    if kind != "gpt2" or cut not in PRE:
        raise InputError(f"{place}: tokenizer.ggml.model = {shown(kind)} with tokenizer.ggml.pre = {shown(cut)} is not read; there "
                         f"is: gpt2 with {', '.join(PRE)}")  # fmt: skip
    if own["tokens"] == _of_bytes()["tokens"]:
        return {META_FILE: json.dumps({"kind": "byte"}).encode()}
    tokens, types = own["tokens"], own.get("token_type") or [NORMAL] * len(own["tokens"])
    added = [
        {"id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": types[index] == CONTROL}
        for index, token in enumerate(tokens) if types[index] in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    begins = own.get("add_bos_token", False) and own.get("bos_token_id") is not None
    table = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE[cut]} if len(PRE[cut]) > 1 else PRE[cut][0],
        "post_processor": _first(tokens[own["bos_token_id"]], own["bos_token_id"]) if begins else None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": cut == "llama-bpe",
                  "vocab": {token: index for index, token in enumerate(tokens)},
                  "merges": [merge.split(" ") for merge in own.get("merges", []) if merge != NEVER]},
    }  # fmt: skip
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
    special = {f"{name}_token": tokens[own[key]] for name, key in names.items() if own.get(key) is not None}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "clean_up_tokenization_spaces": False}
    files = {"tokenizer.json": json.dumps(table, ensure_ascii=False).encode(),
             "tokenizer_config.json": (json.dumps(config, indent=1) + "\n").encode()}  # fmt: skip
    if (template := metadata.get("tokenizer.chat_template")) is not None:
        files["chat_template.jinja"] = template.encode()
    return files


def _first(token: str, index: int) -> dict[str, Any]:
    """A post_processor that puts one token before a text."""
    one, rest = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {"type": "TemplateProcessing", "single": [one, rest], "pair": [one, rest, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}}}  # fmt: skip


# ---- writing ----


def metadata_of(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The tokenizer.ggml.* keys of a tokenizer, without that prefix, for a model of `vocab_size` ids. ConfigError says why
    llama.cpp cannot hold it."""
    if tokenizer.kind == "byte":
        table = _of_bytes()
    elif isinstance(tokenizer, LibraryTokenizer):
        table = _of_library(tokenizer)
    else:
        raise ConfigError(f"a .gguf file cannot hold a {tokenizer.kind} tokenizer; there is: byte, bpe, and byte-level BPE of Hugging "
                          "Face's. Export without it: --format huggingface")  # fmt: skip
    if len(table["tokens"]) > vocab_size:
        raise ConfigError(f"the tokenizer has {len(table['tokens'])} tokens and the model {vocab_size} ids")
    for index in range(len(table["tokens"]), vocab_size):  # rows of the embedding that no token has
        table["tokens"].append(f"[UNUSED_{index}]")
        table["token_type"].append(UNUSED)
    ends = tokenizer.chat_template.further_ends(tokenizer) if tokenizer.chat_template is not None else []
    return {"model": "gpt2", **table, **({"eot_token_id": ends[0]} if ends else {})}


def _of_bytes() -> dict[str, Any]:
    characters = {byte: character for character, byte in byte_characters().items()}
    tokens = [characters[byte] for byte in range(256)]
    tokens[BOS], tokens[EOS] = "<|startoftext|>", "<|endoftext|>"
    types = [CONTROL if byte in (BOS, EOS) else NORMAL for byte in range(256)]
    return {"pre": "gpt-2", "tokens": tokens, "token_type": types, "merges": [NEVER], "eos_token_id": EOS, "add_bos_token": False}


def _of_library(tokenizer: LibraryTokenizer) -> dict[str, Any]:
    described = json.loads(tokenizer.inner.to_str())
    model, other = described["model"], f"a .gguf file cannot hold this {tokenizer.kind} tokenizer: "
    if model.get("type") != "BPE" or model.get("byte_fallback") or "ByteLevel" not in str(described.get("decoder")):
        raise ConfigError(f"{other}llama.cpp's is byte-level BPE, and this is {model.get('type')}; use --format huggingface")
    if described.get("normalizer") is not None and described["normalizer"] != {"type": "NFC"}:
        raise ConfigError(f"{other}it changes the text first (normalizer {shown(described['normalizer'])}); use --format huggingface")
    cut = described.get("pre_tokenizer") or {}
    steps = [_told(step) for step in cut.get("pretokenizers", [cut])]
    name = next((name for name, wanted in PRE.items() if [_told(step) for step in wanted] == steps), None)
    if name is None:
        raise ConfigError(f"{other}llama.cpp knows no pre_tokenizer {shown(cut)}; it knows those of {', '.join(PRE)}. Use --format huggingface")
    added = {entry["id"]: entry for entry in described["added_tokens"]}
    by_id = {index: token for token, index in model["vocab"].items()} | {index: entry["content"] for index, entry in added.items()}
    tokens, types = [], []
    for index in range(tokenizer.vocab_size):
        tokens.append(by_id.get(index, f"[UNUSED_{index}]"))
        special = index == tokenizer.eos_id or (index in added and added[index]["special"])
        types.append(CONTROL if special else USER_DEFINED if index in added else NORMAL if index in by_id else UNUSED)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    table = {"pre": name, "tokens": tokens, "token_type": types, "merges": merges or [NEVER],
             "eos_token_id": tokenizer.eos_id, "add_bos_token": tokenizer.bos_id is not None}  # fmt: skip
    ids = {token: index for index, token in by_id.items()}
    for key, named in (("bos_token_id", "bos_token"), ("unknown_token_id", "unk_token"), ("padding_token_id", "pad_token")):
        token = tokenizer.config.get(named)
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            table[key] = ids[token]
    if tokenizer.bos_id is not None:
        table["bos_token_id"] = tokenizer.bos_id
    return table


def _told(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step of a pre_tokenizer without what changes no id (offsets alone)."""
    return {key: value for key, value in step.items() if key != "trim_offsets"}
