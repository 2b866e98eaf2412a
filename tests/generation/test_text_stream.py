"""Text comes out in whole characters, and no part of a stop text ever does."""

from __future__ import annotations

import random

import pytest

from tests.conftest import make_text
from treadle.generation.text_stream import TextStream
from treadle.text.base import Tokenizer
from treadle.text.byte import ByteTokenizer

TEXT = "naïve Füße 🧵🪡 — “thread”, 織機 and\nmore. " * 6


def shown(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...] = (), prompt: tuple[int, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, prompt, stops)
    pieces = [stream.push(token) for token in ids]
    pieces.append("" if stream.stopped else stream.finish())
    assert "".join(pieces) == stream.text
    return pieces, stream.stopped


@pytest.fixture(scope="module", params=["byte", "bpe", "wordpiece", "char"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "byte":
        return ByteTokenizer()
    return Tokenizer.train(request.param, iter([make_text(60)]), 300)


def test_pieces_join_to_what_the_tokens_stand_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT).tolist()
    pieces, _ = shown(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == TEXT
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_cut_at_the_end_is_left_out() -> None:
    ids = list("a🧵".encode())
    assert shown(ByteTokenizer(), ids[:-1])[0] == ["a", "", "", "", ""]


def test_a_character_that_begins_in_the_prompt_is_whole_with_its_last_byte() -> None:
    ids = list("x🧵y".encode())
    assert shown(ByteTokenizer(), ids[3:], prompt=tuple(ids[:3]))[0] == ["", "🧵", "y", ""]


def test_bytes_that_are_no_text_come_out_and_do_not_hold_the_rest_back() -> None:
    ids = [0xFF - 8, 0x80] * 100 + list(b"end")  # 247 is no byte of UTF-8
    pieces, _ = shown(ByteTokenizer(), ids)
    assert "".join(pieces).endswith("end") and len("".join(pieces)) >= 200
    assert max(len(piece) for piece in pieces) <= 3


@pytest.mark.parametrize("seed", range(30))
def test_stops_cut_where_the_first_begins_and_are_never_shown_in_part(tokenizer: Tokenizer, seed: int) -> None:
    draw = random.Random(seed)
    at = draw.randrange(1, len(TEXT) - 12)
    stops = (TEXT[at : at + draw.randint(1, 12)], TEXT[at + 3 : at + 5] + "?", "never there")
    ids = tokenizer.encode(TEXT).tolist()
    pieces, stopped = shown(tokenizer, ids, stops)
    wanted = TEXT[: min(TEXT.index(stop) for stop in stops if stop in TEXT)]
    assert stopped and "".join(pieces) == wanted
    so_far = ""
    for piece in pieces:  # what was sent cannot be taken back
        so_far += piece
        assert wanted.startswith(so_far)


def test_a_beginning_of_a_stop_that_comes_to_nothing_is_text_after_all() -> None:
    assert "".join(shown(ByteTokenizer(), list(b"one ##"), ("###",))[0]) == "one ##"
    assert "".join(shown(ByteTokenizer(), list(b"##a###b"), ("###",))[0]) == "##a"


def test_of_two_stops_that_end_together_the_longer_counts() -> None:
    assert "".join(shown(ByteTokenizer(), list(b"xabc"), ("bc", "abc"))[0]) == "x"
