"""The markers that a chat template writes around messages, found by what it renders.

A tokenizer without tokens for them has them as ordinary text, and a message that spells one could end its turn and open another. A
template's source does not tell them: `'<|' + message['role'] + '|>'` spells none. So conversations of known words are rendered with each
role that the template takes, and what looks like a marker around these words is one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from treadle.errors import InputError

# <start_of_turn>, <|user|>, </s>, <<SYS>>, [INST], [/INST], [|user|]
MARKER = re.compile(r"<+[^<>\s]{1,64}>+|\[/?[A-Za-z]\w{0,47}\]|\[\|[^\[\]|\s]{1,48}\|\]")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Who may spell what a template writes inside an answer (<think>, <tool_call>): a model's own answers hold it, and a system message
# tells a model to write it.
WRITERS = frozenset({"assistant", "system", "developer"})
SAID = "treadleprobe"  # what messages say while a template is tried out

CALL = "abcdefghi"  # the id of a call: Mistral's templates refuse a result whose id has not nine characters
OF_ROLE = {"tool": {"tool_call_id": CALL, "name": SAID}, "function": {"name": SAID}}  # what templates ask of such messages

Pattern = re.Pattern[str]
Write = Callable[[list[dict[str, Any]], bool], str]


@dataclass(frozen=True)
class Markers:
    """turns: what stands around messages and between them. inner: what stands inside an answer alone, around thoughts and calls."""

    turns: frozenset[str]
    inner: frozenset[str]


class Normalizes(Protocol):
    """What is asked of a tokenizer here."""

    @property
    def normalized_tokens(self) -> frozenset[str]:
        """Tokens that are looked for in the normalised text."""
    def normalized(self, text: str) -> str:
        """The text as the vocabulary sees it; itself where nothing is changed."""


@dataclass(frozen=True)
class Refused:
    """Finds what messages may not say: (in those of WRITERS, in those of others)."""

    written: tuple[Pattern | None, Pattern | None]  # markers that are no tokens
    normal: tuple[Pattern | None, Pattern | None]  # in the normalised text: these, normalised too, and tokens that are read from it
    controls: Pattern | None  # tokens, whose spellings are encoded as ordinary text
    same: bool  # a text that normalising leaves as it is needs no second search

    @classmethod
    def of(cls, turns: set[str], inner: set[str], controls: tuple[str, ...], tokenizer: Normalizes) -> Refused:
        """turns: what nobody may say; inner: what WRITERS may; controls: the tokens among both and others."""
        nobody = turns - set(controls)
        others = nobody | (inner - set(controls))
        read = tokenizer.normalized_tokens.intersection(controls)

        def normal(spelled: set[str]) -> set[str]:
            # Some tokenizers write a space or U+2581 before every text; inside of a message there is none.
            return {tokenizer.normalized(one).strip("\u2581 ") for one in spelled | read} - {""}

        same = normal(others) == others | read
        return cls((_finds(nobody), _finds(others)), (_finds(normal(nobody)), _finds(normal(others))), any_of(controls), same)

    def check(self, number: int, role: str, texts: Iterable[str], tokenizer: Normalizes) -> None:
        """InputError where one of the texts of message `number` says what it may not."""
        which, normalized, same = role not in WRITERS, tokenizer.normalized, self.same
        written, normal = self.written[which], self.normal[which]
        for said in texts:
            if written is not None and (found := written.search(said)):
                raise InputError(f"message {number} says {found[0]!r}, which this tokenizer cannot tell from the template's own: it has "
                                 "no such token. Leave it out, or use the template plain")  # fmt: skip
            if normal is not None and ((plain := normalized(said)) is not said or not same):
                parts = [plain]
                if self.controls is not None and self.controls.search(said):
                    parts = [normalized(part) for part in self.controls.split(said)]
                for part in parts:
                    if found := normal.search(part):
                        raise InputError(f"message {number} says what this tokenizer reads as {found[0]!r}, and cannot tell from the "
                                         "template's own. Leave it out, or use a tokenizer that does not normalise text")  # fmt: skip


@functools.lru_cache(maxsize=64)
def any_of(spellings: tuple[str, ...]) -> Pattern | None:
    """Finds any of them, the longest first; None where there are none."""
    return re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True)))) if spellings else None


def _finds(spellings: set[str]) -> Pattern | None:
    return any_of(tuple(sorted(spellings)))


def markers_of(write: Write, roles: Iterable[str] = ()) -> Markers:
    """What a template writes around messages of the known roles and of `roles`. write(messages, add_generation_prompt) renders;
    a conversation that it refuses with InputError tells nothing."""
    turns: set[str] = set()
    inner: set[str] = set()
    heading = _heading(write)
    for messages in _conversations([*ROLES, *roles]):
        whole, prompt = _tried(write, messages, False), _tried(write, messages, True)
        asked, opening = _parted(whole, prompt, heading)
        turns |= _in(_without_openings(messages, whole, heading)) | _in(asked)
        inner |= _in(whole) | _in(opening)
    for messages in _with_calls():
        turns |= _around_results(write, messages)
        inner |= _in(_tried(write, messages, True)) | _in(_tried(write, messages, False))
    return Markers(frozenset(turns), frozenset(inner - turns))


def _conversations(roles: list[str]) -> Iterator[list[dict[str, Any]]]:
    """Orders of roles of which a template takes some; many refuse a system message, or roles that do not alternate."""
    orders = [["user", "assistant"], ["user", "assistant", "user", "assistant"], ["system", "user", "assistant", "user"]]
    for role in roles:
        if role != "assistant":
            orders += [[role], [role, "user"], ["user", role], ["user", "assistant", role], ["user", role, "assistant"]]
    for order in orders:
        yield [{"role": role, "content": f"{SAID}{place}", **OF_ROLE.get(role, {})} for place, role in enumerate(order)]


def _with_calls() -> Iterator[list[dict[str, Any]]]:
    """Conversations with thoughts, a call of a tool and its result, in the forms that templates read."""
    forms: tuple[Any, ...] = ({}, "{}")  # a table, and the text of one
    for arguments in forms:
        call = {"id": CALL, "type": "function", "function": {"name": SAID, "arguments": arguments}}
        for content in ("", f"{SAID}1"):
            yield [
                {"role": "user", "content": f"{SAID}0"},
                {"role": "assistant", "content": content, "reasoning_content": f"{SAID}4", "tool_calls": [call]},
                {"role": "tool", "content": f"{SAID}2", **OF_ROLE["tool"]},
                {"role": "assistant", "content": f"{SAID}3", "reasoning_content": f"{SAID}5"},
            ]


def _tried(write: Write, messages: list[dict[str, Any]], prompt: bool) -> str:
    try:
        return write(messages, prompt)
    except InputError:
        return ""


def _heading(write: Write) -> str | None:
    """What stands before an answer in a conversation and in a prompt alike. A prompt may go on behind it (<think>), and a conversation may
    (an empty <think></think>, often in its last answer alone): the shortest of what they share is it. None where they share nothing."""
    shared: list[str] = []
    for messages in _conversations([]):
        text = _tried(write, messages, False)
        for place, message in enumerate(messages):
            before, prompt = (_tried(write, messages[:place], asked) for asked in (False, True)) if message["role"] == "assistant" else ("", "")
            if before and len(before) < len(prompt) and prompt.startswith(before) and text.startswith(before):
                asked, written = prompt[len(before) :], text[len(before) :]
                both = asked[: next((n for n, (a, b) in enumerate(zip(asked, written)) if a != b), min(len(asked), len(written)))]
                if both == asked or written[len(both) :].lstrip().startswith(SAID):
                    shared.append(both)
    return min(shared, key=len, default=None)


def _parted(whole: str, prompt: str, heading: str | None) -> tuple[str, str]:
    """What a prompt has more than the conversation: up to the heading of an answer, and what it writes of the answer itself."""
    added = prompt.removeprefix(whole)
    if heading is None or not whole or added == prompt or heading not in added:
        return added, ""
    end = added.rfind(heading) + len(heading) if heading else 0
    return added[:end], added[end:]


def _without_openings(messages: list[dict[str, Any]], text: str, heading: str | None) -> str:
    """The text of a conversation without what stands between the heading of an answer and the answer: an answer's own beginning."""
    for message in messages if heading else ():
        if message["role"] == "assistant":
            at = text.find(message["content"])
            start = text.rfind(heading or "", 0, max(at, 0))
            if start >= 0:
                text = text[: start + len(heading or "")] + text[at:]
    return text


def _around_results(write: Write, messages: list[dict[str, Any]]) -> set[str]:
    """What stands around a tool's result, the third message: no answer holds it, though a conversation with calls alone may show it."""
    before, after = (_tried(write, messages[:end], False) for end in (2, 3))
    found = _in(after[len(before) :]) if after.startswith(before) else _in(after) - _in(before)
    last = {**messages[2], "content": f"{SAID}6"}  # between two results nothing is an answer's, however the template writes answers
    _, _, behind = _tried(write, [*messages[:3], last], False).partition(messages[2]["content"])
    between, there, _ = behind.partition(last["content"])
    return (found if before else set()) | (_in(between) if there else set())


def _in(text: str) -> set[str]:
    return {found for found in MARKER.findall(text) if SAID not in found.lower()}
