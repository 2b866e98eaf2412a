"""An export of a model that converses says where a turn ends, in the files of those who read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import treadle
from treadle.models.export import save_for_transformers
from treadle.models.huggingface.gguf_tokens import metadata_of
from treadle.text.base import Tokenizer
from treadle.text.chat_template import ChatTemplate


@pytest.fixture()
def tokenizer(tmp_path: Path) -> Tokenizer:
    """With a token for the end of a document and one for the end of a turn."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    inner.train_from_iterator(["a talk of two"], trainers.BpeTrainer(vocab_size=280, special_tokens=special, show_progress=False,
                                                                     initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))  # fmt: skip
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=special[0]).save_pretrained(tmp_path / "tokenizer")
    return Tokenizer.load(tmp_path / "tokenizer")


def test_others_stop_at_the_end_of_a_turn(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = treadle.build("transformer", vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=1, num_heads=2)
    for template, ends in (("chatml", [0, 2]), ("plain", 0), (None, 0)):
        tokenizer.chat_template = ChatTemplate.named(template) if template is not None else None
        save_for_transformers(model, tmp_path / str(template), tokenizer)
        assert json.loads((tmp_path / str(template) / "generation_config.json").read_text())["eos_token_id"] == ends
        assert json.loads((tmp_path / str(template) / "config.json").read_text())["eos_token_id"] == 0
        assert metadata_of(tokenizer, tokenizer.vocab_size).get("eot_token_id") == (2 if template == "chatml" else None)
