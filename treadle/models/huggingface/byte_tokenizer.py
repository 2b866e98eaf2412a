"""Bytes as tokens for transformers: a byte-level BPE without merges, whose ids are the bytes."""

from __future__ import annotations

import json
from typing import Any

from treadle.text.byte import BOS, EOS, EOS_TOKEN
from treadle.text.trained import byte_characters

BOS_TOKEN = "<|startoftext|>"


def byte_tokenizer_files() -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json. BOS and EOS are bytes that no text has, and names of special tokens; rows of training begin
    with no BOS, so that nothing there is told to put one before a text."""
    special = [{"id": number, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
               for number, name in ((BOS, BOS_TOKEN), (EOS, EOS_TOKEN))]  # fmt: skip
    level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    letters = sorted(byte_characters().items(), key=lambda one: one[1])  # by their bytes
    vocabulary = {letter: byte for letter, byte in letters if byte not in (BOS, EOS)}
    table: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None, "pre_tokenizer": level,
        "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": {**vocabulary, BOS_TOKEN: BOS, EOS_TOKEN: EOS},
                  "merges": []},
    }  # fmt: skip
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS_TOKEN, "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": (json.dumps(table, ensure_ascii=False) + "\n").encode(),
            "tokenizer_config.json": (json.dumps(told, indent=1) + "\n").encode()}  # fmt: skip
