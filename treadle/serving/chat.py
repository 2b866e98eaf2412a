"""`treadle chat`: a conversation in the terminal, with the commands of `treadle generate --interactive` and two more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from treadle.errors import ConfigError, TreadleError
from treadle.generation.answers import Answer
from treadle.generation.decode import generate
from treadle.generation.decoding import DecodableModel
from treadle.generation.sampling import Sampling
from treadle.generation.session import HELP, Session, led_by
from treadle.text.base import Tokenizer
from treadle.text.chat_template import ChatTemplate

MORE_HELP = """/system TEXT    what the model is told before the conversation; alone: nothing
/reset          forget the conversation, not the system's text
"""
HISTORY_LINES = 1000


class Conversation(Session):
    """Messages so far. Without a template: a text that both sides write on."""

    def __init__(self, model: DecodableModel, tokenizer: Tokenizer, sampling: Sampling, max_new_tokens: int, seed: int = 0,
                 template: ChatTemplate | None = None, system: str | None = None, **options: Any) -> None:  # fmt: skip
        super().__init__(model, tokenizer, sampling, max_new_tokens, seed, **options)
        self.template, self.system = template, system
        self.messages: list[dict[str, str]] = []
        self.ids: list[int] = []  # of the text so far, without a template
        if system is not None and template is None:
            raise ConfigError("a model without a chat template reads no system text; leave --system out, or choose --chat_template chatml")

    def prompt(self, said: str) -> list[int]:
        """The ids that the model reads before it answers."""
        if self.template is None:
            return [*self.ids, *self.tokenizer.encode(said).tolist()] if self.ids else list(map(int, self.tokenizer.prompt_ids(said)))
        system = [{"role": "system", "content": self.system}] if self.system else []
        return list(map(int, self.template.prompt_ids(self.tokenizer, [*system, *self.messages, {"role": "user", "content": said}])))

    def answer(self, said: str, on_text: Callable[[str], None]) -> str:
        """What the model answers, piece by piece and whole. Ctrl-C ends the answer, and what was said so far stays."""
        ids = self.prompt(said)
        answer = Answer(self.tokenizer, self.template, on_text, ids)
        with contextlib.suppress(KeyboardInterrupt):
            generate(self.model, ids, self.max_new_tokens, on_ids=answer.on_ids, seed=self.seed + len(self.messages) // 2,
                     **vars(self.sampling), **self.options)  # fmt: skip
        text = answer.finish()
        self.ids = [*ids, *answer.ids] if self.template is None else []
        self.messages += [{"role": "user", "content": said}, {"role": "assistant", "content": text}]
        return text

    def command(self, line: str) -> str:
        """The commands of Session, /system and /reset."""
        word, _, argument = line.strip().partition(" ")
        if word == "/help":
            return f"/reset          forget the text so far\n{HELP}" if self.template is None else MORE_HELP + HELP
        if word == "/reset":
            self.messages, self.ids = [], []
            return "the conversation begins anew"
        if word == "/system":
            if self.template is None:
                raise ConfigError("a model without a chat template reads no system text; start with --chat_template chatml, llama3 or plain")
            self.system = argument.strip() or None
            return f"system: {self.system}" if self.system else "no system text"
        return super().command(line)

    def greeting(self) -> str:
        kind = "say something" if self.template is not None else "no chat template: type a text, the model writes on"
        return f"{kind}; /help lists the commands, Ctrl-C ends an answer, /quit or Ctrl-D leaves\n"

    def respond(self, line: str, number: int, write: Callable[[str], None]) -> None:
        piece = led_by(line if self.template is None else "", write)
        try:
            self.answer(line, piece)
            write("\n\n")
        except TreadleError as problem:  # a conversation that no longer fits, say: the next line may begin anew
            write(f"{problem}\n")


@contextlib.contextmanager
def history(path: Path) -> Iterator[None]:
    """Lines typed before come back with the arrow keys, where Python has readline; they are kept in a file of the user's alone."""
    try:
        import readline
    except ImportError:
        yield
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)
