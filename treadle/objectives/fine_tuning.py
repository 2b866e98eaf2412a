"""Supervised fine-tuning: the next token over the labels that a conversation's mask leaves, and held-out prompts answered."""

from __future__ import annotations

import torch

from treadle.data.base import Dataset
from treadle.data.conversations import Conversations
from treadle.errors import ConfigError
from treadle.generation.answers import answer_to
from treadle.models.base import Model
from treadle.objectives.next_token import SAMPLE_TEMPERATURE, SAMPLE_TOKENS, NextToken


class FineTuning(NextToken):
    """Cross-entropy of the tokens that the assistant says. Ouyang et al. 2022, arXiv 2203.02155, section 3.5."""

    def prepare(self, model: Model, dataset: Dataset, device: torch.device) -> None:
        super().prepare(model, dataset, device)
        if not model.capabilities.packs and isinstance(dataset, Conversations) and dataset.packing != "none":
            raise ConfigError(f"the model {model.arch} does not keep the documents of a row apart; give each conversation a row of its "
                              "own: --packing none")  # fmt: skip

    def sample(self, model: Model, dataset: Dataset, prompt: str, tokens: int, seed: int) -> str:
        if prompt or not isinstance(dataset, Conversations) or not model.capabilities.decodes or tokens == 0:
            return super().sample(model, dataset, prompt, tokens, seed)
        answered = _answered(model, dataset, 1, tokens, seed)
        return "".join(answered[0].values()) if answered else super().sample(model, dataset, prompt, tokens, seed)

    def samples(self, model: Model, dataset: Dataset, count: int) -> tuple[list[dict[str, str]], dict[str, float]]:
        if not isinstance(dataset, Conversations) or not model.capabilities.decodes:
            return super().samples(model, dataset, count)
        answered = _answered(model, dataset, count, SAMPLE_TOKENS, 0)  # none where documents are learnt from their first token on
        return (answered, {}) if answered else super().samples(model, dataset, count)

    def baselines(self, train: Dataset, held_out: Dataset) -> dict[str, dict[str, float]]:
        return {}  # those of text count all tokens, not the ones that are learnt


def _answered(model: Model, dataset: Conversations, count: int, tokens: int, seed: int) -> list[dict[str, str]]:
    """The prompts of the first conversations of a data set, answered."""
    found = []
    for number, prompt in enumerate(dataset.prompts(count)):
        room = tokens if model.longest_row is None else max(0, min(tokens, model.longest_row - len(prompt)))
        text = answer_to(model, dataset.tokenizer, prompt, room, seed=seed + number, temperature=SAMPLE_TEMPERATURE)
        found.append({"prompt": dataset.tokenizer.decode(prompt), "text": text})
    return found
