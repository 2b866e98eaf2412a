"""What a row of conversations or of preferences says: messages, a prompt with its completion, or text.

The columns are those of Hugging Face's and OpenAI's data: messages [{role, content}], prompt and completion (texts or messages), text,
chosen and rejected; sharegpt's conversations [{from, value}] are read as messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from treadle.errors import InputError

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
                  "function_call": "assistant", "observation": "tool", "function_response": "tool"}  # fmt: skip
SHAREGPT = "in sharegpt's form (from, value), read as messages (role, content)"

UNREAD = ("tools", "functions", "chat_template_kwargs")
# What other trainers take a turn of the assistant out of the loss by: OpenAI's weight, axolotl's train and training.
UNLEARNT = ("weight", "train", "training")

Message = dict[str, Any]


@dataclass(frozen=True)
class Said:
    """What a row says. messages: the conversation; the first `given` of them are a prompt, which is not learnt. text: instead of
    messages, a text that begins with `prompt`."""

    messages: list[Message] | None = None
    given: int = 0
    text: str = ""
    prompt: str = ""
    remark: str = ""

    @property
    def first_turn(self) -> int:
        """How many turns of the assistant are part of the prompt."""
        return sum(message["role"] == "assistant" for message in (self.messages or [])[: self.given])


def said_in(table: dict[str, Any], text_column: str, as_messages: bool) -> Said:
    """What a row of conversations says; InputError that tells what is wrong with it. as_messages: a prompt and its completion that are
    texts become a message of the user and one of the assistant."""
    have = _columns(table)
    if "messages" in have:
        return Said(_messages(table["messages"], "messages"))
    if "conversations" in have:
        found = table["conversations"]
        shared = isinstance(found, list) and any(isinstance(one, dict) and "from" in one for one in found)
        return Said(_messages(_from_sharegpt(found) if shared else found, "conversations"), remark=SHAREGPT if shared else "")
    if {"prompt", "completion"} <= have:
        return _continued(table["prompt"], table["completion"], "completion", as_messages)
    if text_column in have:
        return Said(text=_text(table[text_column], text_column))
    pairs = "; set --objective dpo for preferences" if {"chosen", "rejected"} <= have else ""
    raise InputError(f"no messages, no prompt with a completion and no {text_column!r} (there is: {', '.join(list(table)[:8])}){pairs}")


def pair_in(table: dict[str, Any], as_messages: bool) -> tuple[Said, Said]:
    """(the chosen, the rejected) of a row of preferences; InputError that tells what is wrong with it."""
    have = _columns(table)
    if not {"chosen", "rejected"} <= have:
        said = "; set --objective sft for conversations" if "messages" in have else ""
        raise InputError(f"no chosen and rejected (there is: {', '.join(list(table)[:8])}){said}")
    chosen, rejected = table["chosen"], table["rejected"]
    if chosen == rejected:
        raise InputError("chosen and rejected are the same")
    if "prompt" in have:
        return tuple(_continued(table["prompt"], one, name, as_messages)  # type: ignore[return-value]
                     for one, name in ((chosen, "chosen"), (rejected, "rejected")))  # fmt: skip
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise InputError("chosen and rejected are texts without a prompt, so where the answers begin cannot be told; give a prompt, or "
                         "both as lists of messages")  # fmt: skip
    both = [_messages(one, name) for one, name in ((chosen, "chosen"), (rejected, "rejected"))]
    same = 0
    while same < min(map(len, both)) and both[0][same] == both[1][same]:
        same += 1
    if same == 0:
        raise InputError("chosen and rejected do not begin with the same message: they answer different prompts")
    return Said(both[0], same), Said(both[1], same)


def _columns(table: dict[str, Any]) -> set[str]:
    """The columns that say something; InputError for those which would change what a template writes, and are not passed to it."""
    for name in UNREAD:
        if table.get(name):
            raise InputError(f"{name!r} is not passed to chat templates, so the conversation would not read as it was meant; write what it "
                             "says into a system message, and leave the column out")  # fmt: skip
    return {name for name, value in table.items() if value is not None}


def _continued(prompt: Any, rest: Any, name: str, as_messages: bool) -> Said:
    """A prompt and what follows it, each a text or messages."""
    if isinstance(prompt, str) and isinstance(rest, str) and not as_messages:
        return Said(text=_text(prompt, "prompt") + _text(rest, name), prompt=prompt)
    before = [{"role": "user", "content": _text(prompt, "prompt")}] if isinstance(prompt, str) else _messages(prompt, "prompt")
    after = [{"role": "assistant", "content": _text(rest, name)}] if isinstance(rest, str) else _messages(rest, name)
    if not isinstance(rest, str) and after[: len(before)] == before:  # the prompt once more
        after = after[len(before) :]
    return Said([*before, *after], len(before))


def _messages(found: Any, name: str) -> list[Message]:
    if not isinstance(found, list) or not found:
        raise InputError(f"{name!r} is {'empty' if found == [] else type(found).__name__}, not a list of messages")
    return [_message(one, f"message {number} of {name!r}") for number, one in enumerate(found, 1)]


def _message(found: Any, where: str) -> Message:
    if not isinstance(found, dict) or not isinstance(found.get("role"), str):
        raise InputError(f"{where} has no role and content")
    content = found.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)  # [{"type": "text", "text": ...}], as OpenAI's clients write it
    if content is None and not found.get("tool_calls"):
        raise InputError(f"{where} has no content")
    off = next((key for key in UNLEARNT if key in found and found[key] in (0, False) and found["role"] == "assistant"), None)
    if off is not None:
        raise InputError(f"{where} has {off} = {found[off]!r}: single answers cannot be taken out of what is learnt; end the conversation "
                         "before it, or make what comes up to it a prompt (prompt and completion)")  # fmt: skip
    kept = {key: value for key, value in found.items() if value is not None}
    return kept if content is None else {**kept, "content": _text(content, where)}


def _from_sharegpt(found: list[Any]) -> list[Message]:
    messages = []
    for number, one in enumerate(found, 1):
        if not isinstance(one, dict) or not isinstance(one.get("from"), str) or not isinstance(one.get("value"), str):
            raise InputError(f"message {number} of 'conversations' has no from and value")
        speaker = one["from"].lower()
        marks = {key: one[key] for key in UNLEARNT if key in one}
        messages.append({"role": SHAREGPT_ROLES.get(speaker, speaker), "content": one["value"], **marks})
    return messages


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} is {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{name}: text with an unpaired surrogate, which UTF-8 cannot hold") from None
    return value
