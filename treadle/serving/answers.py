"""What a continuation is on its way: tokens come in from the engine's thread, pieces of OpenAI's answers go out to the network.

A token's probabilities go out with the piece in which its text ends, so pieces and whole answers hold the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from treadle.generation.engine import Token
from treadle.generation.text_stream import TextStream
from treadle.serving.protocol import Asked
from treadle.serving.token_names import TokenNames, finite
from treadle.text.base import Tokenizer


class Channel:
    """Things that any thread puts in and one coroutine takes out, all that are there at a time."""

    def __init__(self) -> None:
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
        self._items: deque[Any] = deque()
        self._called = False

    def put(self, item: Any) -> None:
        self._items.append(item)
        if not self._called:
            self._called = True
            with contextlib.suppress(RuntimeError):  # the loop has ended, so nobody waits
                self._loop.call_soon_threadsafe(self._event.set)

    async def take(self) -> list[Any]:
        """At least one thing, in the order of their coming."""
        while not self._items:
            await self._event.wait()
            self._event.clear()
            self._called = False  # before the things are taken: what comes from now on calls again
        found = []
        while self._items:
            found.append(self._items.popleft())
        return found


@dataclass
class Piece:
    """Some text of a continuation, with the tokens whose text ends in it; reason: why it ended, where it has."""

    index: int
    text: str
    tokens: list[tuple[Token, int]] = field(default_factory=list)  # each with the characters of the text before it
    reason: str | None = None


class Choice:
    """One continuation. `on_token` and `on_end` are the engine's to call; pieces go into the channel, without streaming one at the
    end."""

    def __init__(self, asked: Asked, tokenizer: Tokenizer, prompt: Sequence[int], index: int, channel: Channel, echo: str = "") -> None:
        self.index, self.count = index, 0
        self._stream = TextStream(tokenizer, prompt, asked.stops)
        self._report, self._whole, self._channel, self._echo = asked.logprobs is not None, not asked.stream, channel, echo
        self._waiting: deque[tuple[Token, int, int]] = deque()  # tokens whose text is not shown yet: (token, begins, ends)
        self._piece = Piece(index, echo)
        self._sent = 0  # characters of the continuation in pieces so far

    def on_token(self, token: Token) -> bool:
        begins = self._stream.length
        text = self._stream.push(token.id)
        self.count += 1
        if self._report:
            self._waiting.append((token, begins, self._stream.length))
        self._add(text)
        if not self._whole and (self._piece.text or self._piece.tokens):
            self._send()
        return self._stream.stopped

    def on_end(self, reason: str) -> None:
        """Stop, length, cancelled or an error, once."""
        if not self._stream.stopped:
            self._add(self._stream.finish())
            # What is left are tokens of half characters, and of none.
            self._piece.tokens += [(token, begins + len(self._echo)) for token, begins, _ in self._waiting]
        self._piece.reason = "stop" if self._stream.stopped else reason
        self._send()

    def _add(self, text: str) -> None:
        self._piece.text += text
        self._sent += len(text)
        while self._waiting:
            token, begins, ends = self._waiting[0]
            if begins >= self._sent if self._stream.stopped else ends > self._sent:
                break
            self._piece.tokens.append((token, begins + len(self._echo)))
            self._waiting.popleft()

    def _send(self) -> None:
        self._channel.put(self._piece)
        self._piece = Piece(self.index, "")


class Shapes:
    """OpenAI's objects for one request."""

    def __init__(self, asked: Asked, model: str, fingerprint: str, names: TokenNames) -> None:
        self._asked, self._names = asked, names
        self.id = ("chatcmpl-" if asked.chat else "cmpl-") + uuid.uuid4().hex
        kind = "chat.completion" if asked.chat else "text_completion"
        self._head = {"id": self.id, "object": kind, "created": int(time.time()), "model": model, "system_fingerprint": fingerprint}

    def usage(self, counts: Sequence[int]) -> dict[str, int]:
        """counts: new tokens of each continuation."""
        prompt, new = sum(map(len, self._asked.prompts)), sum(counts)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def answer(self, pieces: Sequence[Piece], counts: Sequence[int]) -> dict[str, Any]:
        """The whole answer, of one piece for each continuation."""
        choices = []
        for piece in sorted(pieces, key=lambda piece: piece.index):
            choice: dict[str, Any] = {"index": piece.index}
            if self._asked.chat:
                choice["message"] = {"role": "assistant", "content": piece.text, "refusal": None}
            else:
                choice["text"] = piece.text
            choices.append({**choice, "logprobs": self._logprobs(piece), "finish_reason": piece.reason})
        return {**self._head, "choices": choices, "usage": self.usage(counts)}

    def first(self, index: int) -> dict[str, Any]:
        """What a stream of a chat begins with: who speaks."""
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None})

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """A piece as the chunks of a stream: its text, and in a chat its end in a chunk of its own."""
        if not self._asked.chat:
            return [self._chunk({"index": piece.index, "text": piece.text, "logprobs": self._logprobs(piece), "finish_reason": piece.reason})]
        found = []
        if piece.text or piece.tokens:
            found.append(self._chunk({"index": piece.index, "delta": {"content": piece.text}, "logprobs": self._logprobs(piece),
                                      "finish_reason": None}))  # fmt: skip
        if piece.reason is not None:
            found.append(self._chunk({"index": piece.index, "delta": {}, "logprobs": None, "finish_reason": piece.reason}))
        return found

    def last(self, counts: Sequence[int]) -> dict[str, Any]:
        """The chunk of stream_options.include_usage."""
        return {**self._chunk(), "usage": self.usage(counts)}

    def _chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        head = {**self._head, "object": "chat.completion.chunk"} if self._asked.chat else self._head
        usage = {"usage": None} if self._asked.include_usage else {}
        return {**head, "choices": list(choices), **usage}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        if not self._asked.chat:
            name = self._names.legacy
            return {
                "tokens": [name(token.id) for token, _ in piece.tokens],
                "token_logprobs": [finite(token.logprob) for token, _ in piece.tokens],
                "top_logprobs": [{name(other): finite(logprob) for other, logprob in token.top} for token, _ in piece.tokens]
                if self._asked.logprobs else None,
                "text_offset": [begins for _, begins in piece.tokens],
            }  # fmt: skip
        content = [{**self._named(token.id, token.logprob), "top_logprobs": [self._named(*one) for one in token.top]}
                   for token, _ in piece.tokens]  # fmt: skip
        return {"content": content, "refusal": None}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self._names.of(token)
        return {"token": text, "logprob": finite(logprob), "bytes": raw}
