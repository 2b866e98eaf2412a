"""`treadle generate`: one prompt, many samples, a file of prompts, or a conversation with the sampler."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from treadle.errors import ConfigError, InputError
from treadle.generation.decode import generate_text
from treadle.generation.decoding import DecodableModel
from treadle.generation.sampling import Sampling
from treadle.text.base import Tokenizer

HELP = """/quit           leave
/temp NUMBER    temperature (0 is greedy)
/topk NUMBER    keep the NUMBER likeliest tokens (0 is off)
/topp NUMBER    keep the likeliest tokens of this total probability (1 is off)
/max NUMBER     tokens to generate
/greedy         temperature 0
/help           this text
anything else is a prompt"""


def led_by(prompt: str, write: Callable[[str], None]) -> Callable[[str], None]:
    """`write` for what follows a prompt: the first piece has the prompt before it. What is refused has no piece, so it echoes nothing."""
    before = [prompt]

    def piece(text: str) -> None:
        write("".join([*before, text]))
        before.clear()

    return piece


class Session:
    """A model, its tokenizer and the options that the commands change."""

    def __init__(self, model: DecodableModel, tokenizer: Tokenizer, sampling: Sampling, max_new_tokens: int, seed: int = 0,
                 stop: str | None = None, **options: Any) -> None:  # fmt: skip
        """options: more of `generate`'s, as weights."""
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.max_new_tokens, self.seed, self.stop, self.options = max_new_tokens, seed, stop, options

    def say(self, prompt: str, number: int = 0, on_text: Callable[[str], None] | None = None) -> str:
        """The continuation of a prompt; sample `number` has its own seed."""
        return generate_text(
            self.model, self.tokenizer, prompt, self.max_new_tokens, on_text=on_text, stop=self.stop,
            seed=self.seed + number, **vars(self.sampling), **self.options,
        )  # fmt: skip

    def write_on(self, prompt: str | None, number: int, write: Callable[[str], None]) -> None:
        """Writes a prompt and its continuation, piece by piece; without a prompt what would begin a line. Nothing is written of what is
        refused: ConfigError comes before the first piece."""
        piece = led_by(prompt or "", write)
        self.say(prompt if prompt is not None else "\n", number, on_text=piece)
        piece("")

    def run_file(self, prompt_file: str, output_file: str | None, samples: int, write: Callable[[str], None]) -> None:
        """One prompt a line; prompts and continuations go to the output file, or to `write`. InputError for a file that
        is missing or holds no prompt, or cannot be written, before the first token. What is written stays when a later prompt is
        refused."""
        path = Path(prompt_file)
        if not path.is_file():
            raise InputError(f"{path} does not exist; --prompt-file is a text file with one prompt a line")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise InputError(f"{path} holds no prompt")
        with ExitStack() as inside:
            put: Callable[[str], object] = write
            if output_file is not None:
                try:
                    put = inside.enter_context(open(output_file, "w", encoding="utf-8")).write
                except OSError as problem:
                    raise InputError(f"{output_file} cannot be written ({problem.strerror}); give another --output-file") from None
            for place, prompt in enumerate(prompts):
                for number in range(samples):
                    continuation = self.say(prompt, number)
                    put(("\n" if place or number else "") + f"{prompt}{continuation}\n")
        if output_file is not None:
            write(f"{len(prompts) * samples} continuations written to {output_file}\n")

    def greeting(self) -> str:
        """What a conversation begins with."""
        return "type a prompt; /help lists the commands, /quit or Ctrl-D leaves\n"

    def respond(self, line: str, number: int, write: Callable[[str], None]) -> None:
        """Writes what the model makes of a line that is no command; number: how many of them came before."""
        self.write_on(line, number, write)
        write("\n\n")

    def interactive(self, read: Callable[[str], str], write: Callable[[str], None]) -> None:
        """Reads lines and commands until /quit (or exit, or quit), the end of the input, or Ctrl-C at an empty prompt."""
        write(self.greeting())
        number = 0
        while True:
            try:
                line = read("> ")
            except (EOFError, KeyboardInterrupt):
                write("\n")
                return
            if line.strip() in ("/quit", "exit", "quit"):
                return
            if line.startswith("/"):
                try:
                    write(self.command(line) + "\n")
                except ConfigError as problem:
                    write(f"{problem}\n")
            elif line:
                self.respond(line, number, write)
                number += 1

    def command(self, line: str) -> str:
        """Carries out one /command and says what holds now; ConfigError for one that is not understood."""
        word, _, argument = line.strip().partition(" ")
        if word == "/help":
            return HELP
        if word == "/greedy":
            self.sampling = replace(self.sampling, temperature=0.0)
            return "temperature 0"
        keys: dict[str, tuple[str, Any]] = {
            "/temp": ("temperature", float), "/topk": ("top_k", int), "/topp": ("top_p", float), "/max": ("max", int)
        }  # fmt: skip
        if word not in keys:
            raise ConfigError(f"{word} is no command; /help lists them")
        name, kind = keys[word]
        try:
            value = kind(argument)
        except ValueError:
            raise ConfigError(f"{word} needs a number, as in `{word} {'40' if kind is int else '0.8'}`") from None
        if name == "max":
            if value < 1:
                raise ConfigError("/max needs a number >= 1")
            self.max_new_tokens = value
        else:
            self.sampling = replace(self.sampling, **{name: value})
        return f"{name} {value}"
