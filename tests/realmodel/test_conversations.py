"""The model's own template and tokenizer on the conversations that ship: ids are transformers', and what is learnt are the answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import treadle
from treadle.text.base import Tokenizer

CORPUS = Path(treadle.__file__).parent / "corpus"
END = "<|im_end|>"


def test_ids_are_transformers_and_the_mask_holds_the_answers_with_their_ends(folder: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    template = ours.chat_template
    assert template is not None and "generation" not in template.source.replace("add_generation_prompt", "")  # no markers: by prefixes
    assert template.stop_ids(ours) == [ours.control_tokens[END]] and template.stop_text(ours) is None
    lines = (CORPUS / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines:
        messages = json.loads(line)["messages"]
        ids, mask = template.encode(ours, messages)
        assert ids.tolist() == theirs.apply_chat_template(messages, tokenize=True)["input_ids"]
        said = [message["content"] + END for message in messages if message["role"] == "assistant"]
        assert theirs.decode(ids[mask].tolist()) == "".join(said)
        prompt = theirs.apply_chat_template(messages[:-1], tokenize=True, add_generation_prompt=True)["input_ids"]
        assert template.prompt_ids(ours, messages[:-1]) == prompt
    assert len(lines) >= 300
