"""What a single token is called in a report of probabilities."""

from __future__ import annotations

import functools

from treadle.generation.text_checks import raw_bytes
from treadle.text.base import Tokenizer

LEAST = -9999.0  # stands for a probability of nothing: JSON has no infinity


class TokenNames:
    """(text, bytes) of each id; bytes are None where the tokenizer cannot tell them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {token: spelled for spelled, token in tokenizer.control_tokens.items()}
        anchor = tokenizer.encode("a").tolist()
        self._anchor = anchor[-1:]  # a first token's space is left out by some decoders
        self.of = functools.lru_cache(maxsize=1 << 16)(self._of)

    def _of(self, token: int) -> tuple[str, list[int] | None]:
        if token in self._special:
            return self._special[token], None
        before = raw_bytes(self._tokenizer, self._anchor)
        raw = raw_bytes(self._tokenizer, [*self._anchor, token])[len(before) :]
        if not raw:
            return f"<|{token}|>", None
        text = raw.decode("utf-8", "replace")
        if "\ufffd" in text and raw == text.encode():  # the decoder had replaced the bytes before
            return text, None
        return text, list(raw)

    def legacy(self, token: int) -> str:
        """One spelling for each token, as the completions API has it: `bytes:` and escapes where the bytes are no text."""
        text, raw = self.of(token)
        if raw is None or "\ufffd" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob: float) -> float:
    return logprob if logprob > LEAST else LEAST  # NaN too
