"""What a model answers to the prompt of a conversation: up to what ends the assistant's turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from treadle.generation.text_stream import TextStream
from treadle.text.base import Tokenizer
from treadle.text.chat_template import ChatTemplate

if TYPE_CHECKING:
    from treadle.models.base import Model


class Answer:
    """An answer while it is generated, by `on_ids` (of `generate`): its tokens without the one that ends the turn, and its text.

    template: what ends a turn; None: the end of a document. on_text hears of each piece. before: the tokens of the prompt, for the space
    that a first word begins with.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None, on_text: Callable[[str], None] = lambda text: None, before: Sequence[int] = ()
    ) -> None:  # fmt: skip
        self._ends = {tokenizer.eos_id, *(template.stop_ids(tokenizer) if template is not None else ())}
        stop = template.stop_text(tokenizer) if template is not None else None
        self._stream, self._on_text = TextStream(tokenizer, before, [stop] if stop else []), on_text
        self.ids: list[int] = []

    def on_ids(self, column: Tensor) -> bool:
        """One more token [1] -> whether the turn has ended."""
        token = int(column[0])
        if token in self._ends:
            return True
        self.ids.append(token)
        self._on_text(self._stream.push(token))
        return self._stream.stopped

    def finish(self) -> str:
        """No more tokens -> the whole text."""
        if not self._stream.stopped:
            self._on_text(self._stream.finish())
        return self._stream.text


def answer_to(model: Model, tokenizer: Tokenizer, prompt: Sequence[int], tokens: int, **sampling: Any) -> str:
    """The answer to a prompt's ids (ChatTemplate.prompt_ids), `tokens` tokens at most, without what ends the turn."""
    answer = Answer(tokenizer, tokenizer.chat_template)
    model.generate(list(prompt), tokens, on_ids=answer.on_ids, **sampling)
    return answer.finish()
