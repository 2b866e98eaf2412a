"""What a model answers to the prompt of a conversation: up to what ends the assistant's turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from treadle.text.base import Tokenizer

if TYPE_CHECKING:
    from treadle.models.base import Model


def answer_to(model: Model, tokenizer: Tokenizer, prompt: Sequence[int], tokens: int, **sampling: Any) -> str:
    """The answer to a prompt's ids (ChatTemplate.prompt_ids), `tokens` tokens at most, without what ends the turn."""
    template = tokenizer.chat_template
    stops = set(template.stop_ids(tokenizer) if template is not None else [tokenizer.eos_id])
    stop = template.stop_text(tokenizer) if template is not None else None
    said: list[int] = []
    text = ""

    def on_ids(column: Tensor) -> bool:
        nonlocal text
        token = int(column[0])
        if token in stops:
            return True
        said.append(token)
        text = tokenizer.decode(said)
        return stop is not None and stop in text

    model.generate(list(prompt), tokens, eos_id=tokenizer.eos_id, on_ids=on_ids, **sampling)
    return (text if stop is None else text.partition(stop)[0]).rstrip("\ufffd")
