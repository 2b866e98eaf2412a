"""Checks on generated text: is it valid UTF-8, does it repeat itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from treadle.text.base import Tokenizer

if TYPE_CHECKING:
    from treadle.models.base import Model


def raw_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    """What ids stand for, undecodable bytes included."""
    return tokenizer.decode(ids, errors="surrogateescape").encode("utf-8", "surrogateescape")


def utf8_validity(data: bytes) -> float:
    """Share of bytes that belong to valid UTF-8; a character cut at the very end is not counted against it."""
    if not data:
        return 1.0
    for cut in range(min(4, len(data) + 1)):
        whole, tail = data[: len(data) - cut], data[len(data) - cut :]
        if cut and not _starts_a_character(tail):
            continue
        try:
            whole.decode("utf-8")
            return 1.0
        except UnicodeDecodeError:
            continue
    bad = sum(0xDC80 <= ord(c) <= 0xDCFF for c in data.decode("utf-8", "surrogateescape"))
    return 1 - bad / len(data)


def _starts_a_character(tail: bytes) -> bool:
    """A lead byte with fewer continuation bytes than it asks for."""
    lead = tail[0]
    wanted = 2 if 0xC2 <= lead < 0xE0 else 3 if 0xE0 <= lead < 0xF0 else 4 if 0xF0 <= lead <= 0xF4 else 0
    return len(tail) < wanted and all(0x80 <= byte <= 0xBF for byte in tail[1:])


def distinct(text: str, n: int) -> float:
    """Different word n-grams as a share of all (Li et al. 2016, arXiv 1510.03055)."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def sample_texts(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[str], tokens: int, seed: int = 0, **sampling: Any
) -> tuple[list[dict[str, str]], dict[str, float]]:
    """Continuations of prompts, and utf8_validity, distinct_1 and distinct_2 over them."""
    found, validity, texts = [], [], []
    for number, prompt in enumerate(prompts):
        ids = tokenizer.prompt_ids(prompt)
        out = model.generate(ids, tokens, eos_id=tokenizer.eos_id, seed=seed + number, **sampling)[
            0, len(ids) :
        ].tolist()
        validity.append(utf8_validity(raw_bytes(tokenizer, out)))
        texts.append(tokenizer.decode(out))
        found.append({"prompt": prompt, "text": texts[-1]})
    joined = " ".join(texts)
    checks = {
        "utf8_validity": sum(validity) / max(1, len(validity)),
        "distinct_1": distinct(joined, 1),
        "distinct_2": distinct(joined, 2),
    }
    return found, checks
