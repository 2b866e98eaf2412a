"""What a student learns from a teacher, one objective a stage (MOHAWK, arXiv 2408.10189; LoLCATs, arXiv 2410.10254).

The teacher is no part of the unit: it is whole on every process, is not trained and not saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from treadle.data.base import Dataset
from treadle.data.batch import IGNORE, Batch
from treadle.errors import ConfigError
from treadle.models.base import Model
from treadle.objectives.base import OBJECTIVES, Losses, LossTerm
from treadle.objectives.next_token import NextToken
from treadle.objectives.settings import DistillSettings
from treadle.objectives.sums import LossSums
from treadle.ops.cross_entropy import linear_cross_entropy
from treadle.ops.divergence import linear_divergence


@contextmanager
def captured_io(modules: list[nn.Module]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(input, output) of each module, as they are called inside. Of any shapes."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        seen.append((arguments[0], output))

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def relative_error(ours: Tensor, theirs: Tensor, real: Tensor) -> Tensor:
    """Sum over tokens of |ours - theirs|^2 / |theirs|^2; each position by itself, so that it does not matter which
    positions share a micro-batch. [B, T, ...], real bool [B, T]."""
    gap, size = (ours.float() - theirs.float()).flatten(2), theirs.float().flatten(2)
    return (gap.square().sum(-1) / size.square().sum(-1).clamp_min(1e-12) * real).sum()


class Distillation(NextToken):
    """Base: holds the teacher, frozen and in evaluation mode. Evaluations ask what the student says of the next token."""

    def __init__(self, teacher: Model, settings: DistillSettings | None = None) -> None:
        super().__init__()
        self.teacher, self.settings = teacher.eval(), settings or DistillSettings()
        for parameter in teacher.parameters():
            parameter.requires_grad_(False)

    def prepare(self, model: Model, dataset: Dataset, device: torch.device) -> None:
        super().prepare(model, dataset, device)
        self.teacher.to(device)
        if model.vocab_size != self.teacher.vocab_size:
            raise ConfigError(f"the student knows {model.vocab_size} tokens, its teacher {self.teacher.vocab_size}; "
                              "leave model.vocab_size out")  # fmt: skip
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trains(name))

    def trains(self, name: str) -> bool:
        """Whether this stage changes the parameter of this name."""
        return True


class _NotInNats(Distillation):
    """Stages whose loss is an error of activations: bits per byte and perplexity of it would mean nothing."""

    def training_metrics(self, sums: LossSums) -> dict[str, float]:
        return {}


class MatchMixers(_NotInNats):
    """Each mixer on what the teacher's mixer of the same block was given: all blocks at once, nothing adds up."""

    headline = "mixer"
    training_line = ("loss",)

    def prepare(self, model: Model, dataset: Dataset, device: torch.device) -> None:
        ours, theirs = model.token_mixers(), self.teacher.token_mixers()
        if not ours or len(ours) != len(theirs):
            raise ConfigError(f"the mixer stage pairs the blocks' mixers, and the student has {len(ours)}, the teacher "
                              f"{len(theirs)}; use --stages logits")  # fmt: skip
        super().prepare(model, dataset, device)
        inside = {id(p) for mixer in ours for p in mixer.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in inside)

    def __call__(self, model: Model, batch: Batch) -> Losses:
        with torch.no_grad(), captured_io(self.teacher.token_mixers()) as seen:
            self.teacher.hidden(batch)
        real = batch.token_mask
        errors = [
            relative_error(ours, theirs, real)
            for ours, (_, theirs) in zip(model.run_token_mixers([given for given, _ in seen], batch), seen)
        ]
        with torch.no_grad():
            stats = {f"mixer_error_{i}": error.detach() / real.sum().clamp_min(1) for i, error in enumerate(errors)}
        return Losses({self.headline: LossTerm(torch.stack(errors).sum() / len(errors), "tokens")}, stats)


class MatchHidden(_NotInNats):
    """The stream after each block, the student running by itself."""

    headline = "hidden"
    training_line = ("loss",)

    def trains(self, name: str) -> bool:
        return not name.startswith(("norm.", "head.", "stream_weights"))  # they come after the last block

    def prepare(self, model: Model, dataset: Dataset, device: torch.device) -> None:
        if len(model.blocks()) != len(self.teacher.blocks()):
            raise ConfigError(f"the hidden stage pairs blocks, and the student has {len(model.blocks())}, the teacher "
                              f"{len(self.teacher.blocks())}; use --stages logits")  # fmt: skip
        super().prepare(model, dataset, device)

    def __call__(self, model: Model, batch: Batch) -> Losses:
        with torch.no_grad(), captured_io(self.teacher.blocks()) as theirs:
            self.teacher.hidden(batch)
        with captured_io(model.blocks()) as ours:
            model.hidden(batch)
        if ours[0][1].shape != theirs[0][1].shape:
            raise ConfigError(f"the student's stream is {list(ours[0][1].shape[2:])}, the teacher's "
                              f"{list(theirs[0][1].shape[2:])}; use --stages logits")  # fmt: skip
        real = batch.token_mask
        errors = [relative_error(o, t, real) for (_, o), (_, t) in zip(ours, theirs)]
        return Losses({self.headline: LossTerm(torch.stack(errors).sum() / len(errors), "tokens")})


class MatchLogits(Distillation):
    """alpha_ce CE + alpha_kd T^2 KL(p_teacher || p_student) (Hinton et al. 2015, arXiv 1503.02531), both per label."""

    headline = "next_token"

    def __call__(self, model: Model, batch: Batch) -> Losses:
        if batch.labels is None:
            raise ConfigError("the batch has no labels; make it with Batch.for_training(ids)")
        s = self.settings
        if model.logit_softcap is not None or self.teacher.logit_softcap is not None:
            raise ConfigError("logits are not matched where final_logit_softcapping bounds them; use a teacher and a student without it, "
                              "or --stages without logits")  # fmt: skip
        with torch.no_grad():
            hidden = self.teacher.hidden(batch).hidden
            assert hidden is not None
            theirs = self.teacher.linear_head(hidden)
        out = model.hidden(batch)
        assert out.hidden is not None
        ours = model.linear_head(out.hidden)
        cross_entropy = linear_cross_entropy(*ours, batch.labels)
        divergence, agreed = linear_divergence(*ours, *theirs, batch.labels, s.distill_temperature)
        scored = (batch.labels != IGNORE).sum().clamp_min(1)
        losses = {
            self.headline: LossTerm(cross_entropy, "labels", s.alpha_ce),
            "kd": LossTerm(divergence, "labels", s.alpha_kd * s.distill_temperature**2),
        }
        return Losses(losses, {**out.stats, "agreement": agreed / scored})


def make_objective(settings: DistillSettings, teacher: Model) -> Distillation:
    """The objective of `settings.stage`."""
    return OBJECTIVES.get(f"distill_{settings.stage}")(teacher, settings)
