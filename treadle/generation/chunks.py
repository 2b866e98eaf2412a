"""Text coloured by the chunks that a hierarchical model finds in it."""

from __future__ import annotations

import sys
from typing import Any

import torch

from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.generation.mode import evaluating
from treadle.terminal import fit
from treadle.text.base import Tokenizer

COLOURS = ("\x1b[30;46m", "\x1b[30;43m")
PLAIN = "\x1b[0m"


def coloured(model: Any, tokenizer: Tokenizer, text: str) -> list[str]:
    """For each stage the text in two colours, changing where a chunk begins, and how long chunks are. ConfigError for a
    model without chunks."""
    if not hasattr(model, "boundaries"):
        raise ConfigError(f"a {model.arch} model has no chunks; --show-chunks is for hnet")
    ids = tokenizer.encode(text)
    tokens = torch.as_tensor(ids.astype("int64"))[None].to(model.device)
    with evaluating(model):
        found = model.boundaries(Batch.from_ids(tokens))
    lines = []
    for stage, marks in enumerate(found):
        starts = [*marks[0].nonzero()[:, 0].tolist(), len(ids)]
        # A chunk may begin inside a character; pieces are decoded together and cut where characters end.
        parts, shown = [], ""
        for number, stop in enumerate(starts[1:]):
            whole = tokenizer.decode(ids[:stop].tolist()).rstrip("\ufffd") if stop < len(ids) else text
            parts.append(f"{COLOURS[number % 2]}{fit(whole[len(shown) :], sys.stdout)}{PLAIN}")
            shown = whole
        spaces = marks[0].cpu()[[i for i in range(1, len(ids)) if tokenizer.decode([int(ids[i - 1])]) == " "]]
        after = f", {float(spaces.float().mean()):.0%} of positions after a space begin one" if len(spaces) else ""
        lines.append("".join(parts))
        lines.append(f"stage {stage}: {len(ids) / max(1, len(starts) - 1):.1f} tokens per chunk{after}")
    return lines
