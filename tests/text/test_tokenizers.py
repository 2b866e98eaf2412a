"""Tokenizers: exact round trips, true byte counts, specials that text cannot spell, equal after saving."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import make_text
from treadle.errors import ConfigError, InputError
from treadle.text.base import TRAINABLE, Tokenizer

HARD = "héllo\t\n  नमस्ते 😀 \x00<|endoftext|> \r\n" + "x" * 300 + " 1234 ½ \u2581 <0x41>"
KINDS = ["byte", *TRAINABLE]
_made: dict[str, Tokenizer] = {}


def tokenizer(kind: str) -> Tokenizer:
    if kind not in _made:
        _made[kind] = (
            Tokenizer.load("byte") if kind == "byte" else Tokenizer.train(kind, iter([make_text(300) + "é½"]), 320)
        )
    return _made[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_and_byte_lengths(kind: str) -> None:
    made = tokenizer(kind)
    for text in (HARD, "", " ", "\n\n\n", make_text(20)):
        ids = made.encode(text)
        assert made.decode(ids) == text
        assert made.byte_lengths[ids].sum() == len(text.encode())
        assert made.eos_id not in ids and ids.max(initial=0) < made.vocab_size


@pytest.mark.parametrize("kind", KINDS)
@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_text_round_trips(kind: str, text: str) -> None:
    made = tokenizer(kind)
    assert made.decode(made.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(kind: str, tmp_path: Path) -> None:
    made = tokenizer(kind)
    made.save(tmp_path)
    back = Tokenizer.load(tmp_path)
    assert type(back) is type(made) and back.fingerprint() == made.fingerprint()
    assert np.array_equal(back.encode(HARD), made.encode(HARD)) and back.eos_id == made.eos_id
    assert np.array_equal(back.byte_lengths, made.byte_lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_specials_count_as_specified_and_never_show(kind: str) -> None:
    made = tokenizer(kind)
    assert made.byte_lengths[made.eos_id] == 1 and made.byte_lengths.shape == (made.vocab_size,)
    assert made.decode([made.eos_id, *made.encode("a"), made.eos_id]) == "a"
    if made.bos_id is not None:
        assert made.byte_lengths[made.bos_id] == 0


def test_training_is_reproducible() -> None:
    one, two = (Tokenizer.train("bpe", iter([make_text(200)]), 300) for _ in range(2))
    assert one.fingerprint() == two.fingerprint() != tokenizer("bpe").fingerprint()


def test_characters_are_single_tokens() -> None:
    made = tokenizer("char")
    assert len(made.encode("éé½")) == 3 and len(made.encode("ab")) == 2
    assert len(made.encode("😀")) == 4  # unseen in training: its bytes


def test_broken_bytes_decode_as_asked() -> None:
    made = tokenizer("byte")
    ids = list("é".encode())[:1]
    assert made.decode(ids) == "\ufffd"
    with pytest.raises(UnicodeDecodeError):
        made.decode(ids, errors="strict")


def test_a_hugging_face_folder_loads(tmp_path: Path) -> None:
    tokenizer("bpe").inner.save(str(tmp_path / "tokenizer.json"))  # type: ignore[attr-defined]
    made = Tokenizer.load(tmp_path)
    assert made.decode(made.encode(HARD)) == HARD and made.kind == "huggingface"
    assert Tokenizer.load(tmp_path / "tokenizer.json").fingerprint() == made.fingerprint()


def test_sentencepiece(tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece", reason="the extra sentencepiece is not installed")
    (tmp_path / "text.txt").write_text(make_text(300))
    spm.SentencePieceTrainer.train(input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "m"), vocab_size=300,
                                   byte_fallback=True, hard_vocab_limit=False, minloglevel=2, add_dummy_prefix=False,
                                   normalization_rule_name="identity", remove_extra_whitespaces=False)  # fmt: skip
    made = Tokenizer.load(tmp_path / "m.model")
    text = "The house was empty, नमस्ते."
    ids = made.encode(text)
    assert made.decode(ids) == text and made.byte_lengths[ids].sum() == len(text.encode())
    made.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").fingerprint() == made.fingerprint()
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    with pytest.raises(InputError):
        Tokenizer.load(tmp_path / "bad.model")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Tokenizer.load("gpt2"), "treadle tokenizer train"),
        (lambda: Tokenizer.train("bpe", iter(["a"]), 100), "at least 257"),
        (lambda: Tokenizer.train("byte", iter(["a"]), 300), "not trained"),
        (lambda: Tokenizer.train("bpee", iter(["a"]), 300), "bpe"),
    ],
)
def test_errors(make, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((ConfigError, InputError)) as caught:
        make()
    assert says in str(caught.value)
