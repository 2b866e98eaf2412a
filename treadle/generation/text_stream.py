"""From tokens that arrive one at a time to text that may be shown: whole characters, and never a part of a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from treadle.text.base import Tokenizer

CONTEXT = 8  # tokens of the prompt before the first new one: whether a word begins with a space depends on what it follows
WINDOW = 48  # tokens that are decoded again at most; valid text needs 8, bytes that are no UTF-8 would need all of them
HALF = "\ufffd"  # what a character decodes to while its bytes are still arriving


class TextStream:
    """Text of one continuation. `push` and `finish` return what may be shown now; `text` is all that was shown."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._window = list(prompt_ids[-CONTEXT:])
        self._known = len(_whole(tokenizer.decode(self._window)))  # characters of the window that were taken before
        self._recent = 0  # tokens at the end of the window that the next move keeps
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._held = ""  # characters that may be the beginning of a stop text
        self._shown: list[str] = []
        self.length = 0  # characters taken from tokens, held ones included
        self.stopped = False

    @property
    def text(self) -> str:
        """All that was shown."""
        return "".join(self._shown)

    def push(self, token: int) -> str:
        """One more token -> the text that it lets out, often none. After it `stopped` says whether a stop text is complete."""
        if self.stopped:
            return ""
        self._window.append(token)
        self._recent += 1
        text = self._tokenizer.decode(self._window)
        # Only the last character can still change: what stands before it was cut off by a byte that cannot go on with it.
        whole = text[:-1] if text.endswith(HALF) else text
        fresh = whole[self._known :]
        self._known = max(self._known, len(whole))
        if whole is text and self._recent > CONTEXT:
            self._move(CONTEXT, 0)
        elif self._recent > WINDOW:
            self._move(CONTEXT, 1)
        return self._let_out(fresh)

    def finish(self) -> str:
        """The end by anything but a stop text: what was held back is text after all; a half character is left out."""
        last, self._held = self._held, ""
        self._shown.append(last)
        return last

    def _move(self, keep: int, half: int) -> None:
        """The window begins later. half: characters at its end that are not taken yet."""
        self._window = self._window[-keep:]
        self._recent = 0
        self._known = max(0, len(self._tokenizer.decode(self._window)) - half)

    def _let_out(self, fresh: str) -> str:
        if not fresh:
            return ""
        self.length += len(fresh)
        if not self._stops:
            self._shown.append(fresh)
            return fresh
        waiting = self._held + fresh
        ends = [at for stop in self._stops if (at := waiting.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self.length -= len(waiting) - min(ends)
            out, self._held = waiting[: min(ends)], ""
        else:
            keep = self._begun(waiting)
            out, self._held = waiting[: len(waiting) - keep], waiting[len(waiting) - keep :]
        self._shown.append(out)
        return out

    def _begun(self, waiting: str) -> int:
        """Characters at the end of `waiting` with which a stop text may begin."""
        for count in range(min(len(waiting), self._longest - 1), 0, -1):
            tail = waiting[-count:]
            if any(stop.startswith(tail) for stop in self._stops):
                return count
        return 0


def _whole(text: str) -> str:
    return text[:-1] if text.endswith(HALF) else text
