"""The [tokenizer] section."""

from __future__ import annotations

from treadle.settings import Settings, option


class TokenizerSettings(Settings):
    """How text becomes tokens."""

    name: str = option("auto", aliases=("type", "tokenizer_name", "tokenizer_path"), change="guarded")
    """auto (BPE, or bytes when the text is under 200 kB), byte, bpe, wordpiece, unigram, char, or the path of a
    tokenizer folder, tokenizer.json or SentencePiece .model file."""

    vocab_size: int = option(2048, change="guarded", ge=257, le=1_000_000)
    """Number of tokens of a tokenizer trained here (the byte tokenizer always has 256)."""

    train_bytes: int = option(20_000_000, change="guarded", ge=1)
    """At most this many bytes of the training text are read to train a tokenizer."""
