"""What makes contestants comparable, on losses as they were seen."""

from __future__ import annotations

from typing import Any

import pytest

from bench.equal import later_loss, problems, remarks

FALLS = [5.39, 4.14, 3.81, 3.60, 3.47, 3.24, 3.03, 2.99]
FLIPS = [5.39, 4.14, 3.81, 3.60, 3.47, 3.24, 3.03, 9.30]  # a true loss: the mean logits changed their sign


def one(losses: list[float], parameters: int = 1000, tokens: int = 4096) -> dict[str, Any]:
    return {"losses": losses, "parameters": parameters, "tokens_per_step": tokens}


def test_one_step_of_changed_sign_is_a_remark_and_no_problem() -> None:
    found = {"ours": one(FALLS), "theirs": one(FLIPS)}
    assert problems(found) == []
    assert remarks(found) == ["theirs: the loss rose from 3.03 to 9.30 at step 8"]
    assert later_loss(FLIPS) == pytest.approx((3.24 + 3.47) / 2)


@pytest.mark.parametrize(
    "other, words",
    [
        (one([5.4, 5.5, 7.0, 9.0, 9.9]), "does not fall: 5.400 -> 9.000"), (one([float("nan")] * 5), "does not fall"),
        (one(FALLS, parameters=1011), "1011 parameters"), (one(FALLS, tokens=4080), "4080 tokens a step"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_said(other: dict[str, Any], words: str) -> None:
    assert [words in said for said in problems({"ours": one(FALLS), "theirs": other})] == [True]
