"""Encoding by remembered words gives the library's ids, character by character, and steps aside where it is not known to."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import make_text
from treadle.text import words
from treadle.text.base import Tokenizer
from treadle.text.trained import LibraryTokenizer
from treadle.text.words import WordCache

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
PIECES = ["the", " It's", " HE'LL", "'Re", "\u017f", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2028", "\u2014", "\u00e9t\u00e9", "\u6f22\u5b57", "\u0664\u0662", "\u00b2", "123456", "...!?",
          "_", "\u0301", "\U0001f600", "\U0001d49c", "\ua7f7", "\x1c", "\x00", "<|endoftext|>", "<tool>", "\u200b", "\u3000"]  # fmt: skip


def split_by(pattern: str, **options: Any) -> Any:
    """A BPE tokenizer as Llama 3's and its kin are, trained on a little text."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Inner

    inner = Inner(models.BPE(dropout=options.get("dropout")))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), options.get("behavior", "isolated")),
                                                   pre_tokenizers.ByteLevel(add_prefix_space=options.get("prefix", False), use_regex=False)])  # fmt: skip
    if options.get("normalizer"):
        inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator([make_text()], trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False))
    inner.add_tokens([AddedToken("<tool>", special=False)])
    return LibraryTokenizer(inner, "<|endoftext|>")


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    made: dict[str, Any] = {kind: Tokenizer.train(kind, iter([make_text()]), 500) for kind in ("bpe", "wordpiece", "unigram")}
    return {**made, "llama3": split_by(LLAMA3), "qwen2": split_by(QWEN2)}


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "llama3", "qwen2"])
def test_the_ids_are_the_librarys(tokenizers: dict[str, Any], kind: str) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer._words is not None

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6), st.characters(max_codepoint=0x2FF)), max_size=12).map("".join))
    def same(text: str) -> None:
        assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.inner.encode(text, add_special_tokens=False).ids

    same()
    text = make_text(2000)
    assert tokenizer.encode_batch([text, "", "a"])[0].tolist() == tokenizer.encode(text).tolist()


def test_every_character_that_is_called_known_is_cut_as_there(tokenizers: dict[str, Any]) -> None:
    from tokenizers import Regex, pre_tokenizers

    there: dict[str, Any] = {"bpe": pre_tokenizers.ByteLevel(add_prefix_space=False), "llama3": pre_tokenizers.Split(Regex(LLAMA3), "isolated")}
    known = [chr(code) for code in range(0x20000) if not 0xD800 <= code <= 0xDFFF and not words._unknown().search(chr(code))]
    assert len(known) > 60_000
    for kind, splitter in there.items():
        for character in known:
            text = f"a{character}b {character} {character}1  {character}\n{character}{character}.{character}"
            assert tokenizers[kind]._words._cut(text) == [text[a:b] for _, (a, b) in splitter.pre_tokenize_str(text)], hex(ord(character))


@pytest.mark.parametrize("options", [{"normalizer": True}, {"dropout": 0.1}, {"behavior": "removed"}, {"prefix": True}])
def test_what_is_not_word_by_word_goes_through_the_library(options: dict[str, Any]) -> None:
    assert split_by(LLAMA3, **options)._words is None


@pytest.mark.parametrize("pattern", [r"\w+|\W+", r"\p{Lu}+|[^\p{Lu}]+", r"(?<!x)\p{L}+|.", r"[\p{L}&&[a-z]]+|.", r"\s++$|\S+|\s", r"\p{L}+"])
def test_other_patterns_go_through_the_library_or_agree(pattern: str) -> None:
    tokenizer = split_by(pattern)
    for text in (make_text(20), words.PROBE, "a\n", "a  \n b\u00e9"):
        assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.inner.encode(text, add_special_tokens=False).ids
    assert (tokenizer._words is None) or pattern == r"\p{L}+"


def test_a_tokenizer_that_cuts_otherwise_than_its_file_says_is_found_out(monkeypatch: pytest.MonkeyPatch, tokenizers: dict[str, Any]) -> None:
    monkeypatch.setattr(words, "GPT2", words.GPT2.replace(r" ?\p{N}+", r" ?\p{N}"))
    assert WordCache.of(tokenizers["bpe"].inner) is None


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch, tokenizers: dict[str, Any]) -> None:
    monkeypatch.setattr(words, "MOST_WORDS", 50)
    monkeypatch.setattr(words, "MOST_CHARACTERS", 500)
    made = WordCache.of(tokenizers["bpe"].inner)
    assert made is not None
    dice = random.Random(0)
    for _ in range(50):
        text = " ".join("".join(dice.choices("abcdef", k=dice.randint(1, 9))) for _ in range(30))
        assert made.encode(text).tolist() == tokenizers["bpe"].encode(text).tolist()
        assert len(made._known) <= 50 + 30 and made._characters <= 500 + 300
    assert made.encode("ab " * 100_000).tolist() == tokenizers["bpe"].encode("ab " * 100_000).tolist()
