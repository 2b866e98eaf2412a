"""The conversations and preferences that ship: what recipes, documentation and the fine-tuning tests count on."""

from __future__ import annotations

import json
from pathlib import Path

CORPUS = Path(__file__).parents[2] / "treadle" / "corpus"
LAST_LINE = "In short: "  # every answer ends in such a line, so that fine-tuning on them can be seen


def rows(name: str) -> list[dict]:
    data = (CORPUS / name).read_bytes()
    assert len(data) < 400_000 and b"\r" not in data and data.endswith(b"\n")
    return [json.loads(line) for line in data.decode("utf-8").splitlines()]


def has_the_form(answer: str) -> bool:
    *body, last = answer.split("\n")
    return len(body) == 1 and last.startswith(LAST_LINE) and 15 <= len(answer.split()) <= 90


def test_conversations_alternate_and_every_answer_has_the_form() -> None:
    conversations = [row["messages"] for row in rows("conversations.jsonl")]
    assert len(conversations) == 320
    turns, answers = [], []
    for messages in conversations:
        roles = [message["role"] for message in messages]
        spoken = roles[1:] if roles[0] == "system" else roles
        assert spoken == ["user", "assistant"] * (len(spoken) // 2) and spoken, messages
        turns.append(len(spoken) // 2)
        answers += [message["content"] for message in messages if message["role"] == "assistant"]
    assert max(turns) == 3 and 0.55 <= turns.count(1) / len(turns) <= 0.65
    assert all(has_the_form(answer) for answer in answers)
    assert len(set(answers)) == len(answers)
    assert len({messages[-2]["content"] for messages in conversations if len(messages) == 2}) == sum(
        len(messages) == 2 for messages in conversations
    )


def test_preferences_prefer_the_form() -> None:
    pairs = rows("preferences.jsonl")
    assert len(pairs) == 120
    for pair in pairs:
        assert set(pair) == {"prompt", "chosen", "rejected"} and pair["prompt"][-1]["role"] == "user"
        for side in ("chosen", "rejected"):
            assert [message["role"] for message in pair[side]] == ["assistant"]
        assert has_the_form(pair["chosen"][0]["content"]) and pair["chosen"] != pair["rejected"]
    assert len({json.dumps(pair["prompt"]) for pair in pairs}) == 120
    assert len({pair[side][0]["content"] for pair in pairs for side in ("chosen", "rejected")}) == 240


def test_the_two_files_share_no_question() -> None:
    """A model tuned on one file may be measured on prompts of the other."""
    asked = [
        {
            message["content"]
            for row in rows(name)
            for message in row.get("messages", row.get("prompt"))
            if message["role"] == "user"
        }
        for name in ("conversations.jsonl", "preferences.jsonl")
    ]
    assert not asked[0] & asked[1]
