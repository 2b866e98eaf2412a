"""A conversation in the terminal: what the model reads at each turn, what ends an answer, and what stays of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_text
from tests.serving.conftest import byte_model
from treadle.errors import ConfigError
from treadle.generation.sampling import Sampling
from treadle.serving import chat
from treadle.serving.chat import Conversation, history
from treadle.text.base import Tokenizer
from treadle.text.byte import ByteTokenizer
from treadle.text.chat_template import ChatTemplate

GREEDY = Sampling(temperature=0.0)


def scripted(monkeypatch: pytest.MonkeyPatch, answer: list[int], interrupt_after: int | None = None) -> list[list[int]]:
    """The model writes these ids whatever it reads -> the prompts it got."""
    read: list[list[int]] = []

    def generate(model: Any, ids: list[int], count: int, on_ids: Callable[[Any], bool], **options: Any) -> None:
        read.append(list(ids))
        for number, token in enumerate(answer[:count]):
            if number == interrupt_after:
                raise KeyboardInterrupt
            if on_ids(torch.tensor([token])):
                return

    monkeypatch.setattr(chat, "generate", generate)
    return read


def talk(conversation: Conversation, *lines: str) -> str:
    said = iter(lines)
    out: list[str] = []

    def read(prompt: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    conversation.interactive(read, out.append)
    return "".join(out)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train("bpe", iter([make_text(60)]), 300)


def test_a_turn_reads_the_turns_before_it(monkeypatch: pytest.MonkeyPatch, bpe: Tokenizer) -> None:
    template = ChatTemplate.named("plain")
    read = scripted(monkeypatch, [*bpe.encode("fine").tolist(), bpe.eos_id, *bpe.encode("never").tolist()])
    out = talk(Conversation(None, bpe, GREEDY, 50, template=template), "how", "/system s", "and", "/reset", "anew")  # type: ignore[arg-type]
    assert out.count("fine\n\n") == 3 and "never" not in out
    turns = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "fine"}, {"role": "user", "content": "and"}]
    system = [{"role": "system", "content": "s"}]
    assert read == [template.prompt_ids(bpe, turns[:1]), template.prompt_ids(bpe, system + turns),
                    template.prompt_ids(bpe, [*system, {"role": "user", "content": "anew"}])]  # fmt: skip


def test_an_end_of_turn_that_is_text_ends_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    template, tokenizer = ChatTemplate.named("chatml"), ByteTokenizer()
    end = template.stop_text(tokenizer)
    assert end
    scripted(monkeypatch, tokenizer.encode(f"fine{end}never").tolist())
    conversation = Conversation(None, tokenizer, GREEDY, 50, template=template)  # type: ignore[arg-type]
    assert talk(conversation, "how").count("fine\n\n") == 1 and conversation.messages[-1]["content"] == "fine"


def test_ctrl_c_ends_the_answer_and_not_the_program(monkeypatch: pytest.MonkeyPatch, bpe: Tokenizer) -> None:
    scripted(monkeypatch, list(b"one two"), interrupt_after=3)
    conversation = Conversation(None, ByteTokenizer(), GREEDY, 50, template=ChatTemplate.named("plain"))  # type: ignore[arg-type]
    out = talk(conversation, "count", "again")
    assert out.count("one\n\n") == 2 and "two" not in out
    assert [message["content"] for message in conversation.messages] == ["count", "one", "again", "one"]


def test_without_a_template_the_model_writes_on() -> None:
    model: Any = byte_model()
    conversation = Conversation(model, ByteTokenizer(), GREEDY, 12)
    first = talk(conversation, "The wheel", " turned")
    ids = list(b"The wheel")
    for more in (b"", b" turned"):
        ids += more
        new = model.generate(torch.tensor([ids]), 12, temperature=0.0)[0, len(ids) :].tolist()
        ids += new[: new.index(255)] if 255 in new else new
    assert conversation.ids == ids and "The wheel" in first
    with pytest.raises(ConfigError, match="chat_template"):
        conversation.command("/system x")
    assert conversation.command("/reset") and conversation.ids == []
    conversation.options["speculative"] = "guesses"
    assert "a refused text" not in talk(conversation, "a refused text")  # the reason alone, no beginning of an answer


def test_a_number_out_of_range_is_said_and_the_conversation_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, list(b"ok"))
    out = talk(Conversation(None, ByteTokenizer(), GREEDY, 5), "/temp -1", "/max 0", "/nothing", "/topp 0.5", "x")  # type: ignore[arg-type]
    assert "temperature = -1" in out and "/max needs" in out and "/nothing is no command" in out and "top_p 0.5" in out and "xok" in out


def test_lines_typed_before_come_back_and_are_the_users_alone(tmp_path: Path) -> None:
    readline = pytest.importorskip("readline", reason="this Python has no readline")
    readline.clear_history()
    path = tmp_path / "new" / "history"
    with history(path):
        readline.add_history("a line")
    readline.clear_history()
    assert "a line" in path.read_text() and path.stat().st_mode & 0o077 == 0
    with history(path):
        assert readline.get_history_item(readline.get_current_history_length()) == "a line"
