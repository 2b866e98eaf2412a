"""The markers that a chat template writes around messages, found by what it renders.

A tokenizer without tokens for them has them as ordinary text, and a message that spells one could end its turn and open another. A
template's source does not tell them: `'<|' + message['role'] + '|>'` spells none. So conversations of known words are rendered with each
role that the template takes, and what looks like a marker around these words is one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from treadle.errors import InputError

# <start_of_turn>, <|user|>, </s>, <<SYS>>, [INST], [/INST], [|user|]
MARKER = re.compile(r"<+[^<>\s]{1,64}>+|\[/?[A-Za-z]\w{0,47}\]|\[\|[^\[\]|\s]{1,48}\|\]")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Who may spell what a template writes inside an answer (<think>, <tool_call>): a model's own answers hold it, and a system message
# tells a model to write it.
WRITERS = frozenset({"assistant", "system", "developer"})
SAID = "treadleprobe"  # what messages say while a template is tried out

Write = Callable[[list[dict[str, Any]], bool], str]


@dataclass(frozen=True)
class Markers:
    """turns: what stands around messages and between them. inner: what stands inside an answer alone, around thoughts and calls."""

    turns: frozenset[str]
    inner: frozenset[str]


def markers_of(write: Write, roles: Iterable[str] = ()) -> Markers:
    """What a template writes around messages of the known roles and of `roles`. write(messages, add_generation_prompt) renders;
    a conversation that it refuses with InputError tells nothing."""
    turns: set[str] = set()
    inner: set[str] = set()
    for messages in _conversations([*ROLES, *roles]):
        whole, prompt = _tried(write, messages, False), _tried(write, messages, True)
        turns |= _in(_without_openings(write, messages, whole)) | _in(prompt.removeprefix(whole))
        inner |= _in(whole)
    for messages in _with_calls():
        inner |= _in(_tried(write, messages, True)) | _in(_tried(write, messages, False))
    return Markers(frozenset(turns), frozenset(inner - turns))


def _conversations(roles: list[str]) -> Iterator[list[dict[str, Any]]]:
    """Orders of roles of which a template takes some; many refuse a system message, or roles that do not alternate."""
    orders = [["user", "assistant"], ["user", "assistant", "user", "assistant"], ["system", "user", "assistant", "user"]]
    for role in roles:
        if role != "assistant":
            orders += [[role], [role, "user"], ["user", role], ["user", "assistant", role], ["user", role, "assistant"]]
    for order in orders:
        yield [{"role": role, "content": f"{SAID}{place}"} for place, role in enumerate(order)]


def _with_calls() -> Iterator[list[dict[str, Any]]]:
    """Conversations with thoughts, a call of a tool and its result, in the forms that templates read."""
    forms: tuple[Any, ...] = ({}, "{}")  # a table, and the text of one
    for arguments in forms:
        call = {"id": "abcdefghi", "type": "function", "function": {"name": SAID, "arguments": arguments}}
        for content in ("", f"{SAID}1"):
            yield [
                {"role": "user", "content": f"{SAID}0"},
                {"role": "assistant", "content": content, "reasoning_content": f"{SAID}4", "tool_calls": [call]},
                {"role": "tool", "content": f"{SAID}2", "tool_call_id": "abcdefghi", "name": SAID},
                {"role": "assistant", "content": f"{SAID}3", "reasoning_content": f"{SAID}5"},
            ]


def _tried(write: Write, messages: list[dict[str, Any]], prompt: bool) -> str:
    try:
        return write(messages, prompt)
    except InputError:
        return ""


def _without_openings(write: Write, messages: list[dict[str, Any]], text: str) -> str:
    """The text of a conversation without what stands between the heading of an answer, as prompts write it, and the answer: an answer's own
    beginning, such as an empty <think></think>."""
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            before, prompt = (_tried(write, messages[:place], asked) for asked in (False, True))
            heading, at = prompt.removeprefix(before), text.find(message["content"])
            start = text.rfind(heading, 0, max(at, 0)) if heading and heading != prompt else -1
            if start >= 0:
                text = text[: start + len(heading)] + text[at:]
    return text


def _in(text: str) -> set[str]:
    return {found for found in MARKER.findall(text) if SAID not in found.lower()}
