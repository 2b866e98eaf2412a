"""Changes nothing: the [train] and [optim] sections."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, model_validator

from treadle.errors import ConfigError
from treadle.settings import Settings, option

Optimizer = Literal["adamw", "muon", "normuon", "soap"]
PRECISION_SPELLINGS = {"float32": "fp32", "none": "fp32", "no": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def _boolean_precision(name: str) -> Callable[[Any], dict[str, Any]]:
    def translate(value: Any) -> dict[str, Any]:
        if not isinstance(value, bool):
            raise ConfigError("(allowed: true, false)")
        return {"train.precision": name} if value else {}

    return translate


def _betas(value: Any) -> dict[str, Any]:
    """torch.optim's pair."""
    pair = [float(part) for part in (value.strip("()").split(",") if isinstance(value, str) else value)]
    if len(pair) != 2:
        raise ConfigError("give the two decays, as in [0.9, 0.95]")
    return {"optim.adam_beta1": pair[0], "optim.adam_beta2": pair[1]}


def _every_n(value: Any) -> Any:
    """ "every_3" is 3."""
    match = re.fullmatch(r"every[_-](\d+)", value) if isinstance(value, str) else None
    return int(match[1]) if match else value


class TrainSettings(Settings):
    """How long, in what portions and in what precision."""

    max_steps: int | None = option(None, aliases=("steps", "max_iters"), ge=1)
    """Optimiser steps in all; without it num_train_epochs decides."""

    num_train_epochs: float = option(1.0, aliases=("num_epochs", "epochs"), gt=0)
    """Passes over the data when max_steps is not given; typed, it takes the place of a recipe's max_steps."""

    per_device_train_batch_size: int = option(16, aliases=("batch_size",), ge=1)
    """Rows in one forward pass of one device."""

    gradient_accumulation_steps: int | None = option(None, ge=1)
    """Forward passes in one optimiser step; without it 1, or what global_batch_size asks for."""

    global_batch_size: int | None = option(None, change="guarded", ge=1)
    """Rows in one optimiser step over all devices; fixed at the first start of a run."""

    batch_size_schedule: list[list[float]] | None = option(None, change="guarded")
    """[[0, 1], [2000, 2], [6000, 4]]: from each step on, an optimiser step takes so many times global_batch_size rows, by more
    forward passes. A step between 0 and 1 is a share of the run, as in [[0, 1], [0.5, 2]]. Needs max_steps. The data's order
    does not depend on it."""

    seq_len_schedule: list[list[float]] | None = option(None, aliases=("sequence_length_schedule",), change="guarded")
    """[[0, 64], [500, 128], [1500, 256]]: from each step on, rows of text are cut into rows of so many tokens, which divides
    seq_len (seq_len itself where it is less). A step between 0 and 1 is a share of the run. A step keeps its tokens and their
    labels; attention looks less far back and costs less."""

    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = option(
        "auto", aliases=("mixed_precision", "amp_dtype"), change="fixed", spellings=PRECISION_SPELLINGS
    )
    """auto picks bf16 (autocast over fp32 weights) where it is known to pay, else fp32; fp16 scales the loss; fp8 is bf16
    with 8-bit products in the blocks' linear layers, on GPUs from Ada and Hopper on."""

    attention_backend: Literal["auto", "flash", "efficient", "cudnn", "math"] = option("auto", aliases=("attn_implementation", "sdpa_backend"))
    """The kernel of full attention while training: auto (the fastest known), or one of torch's by name, where the device has
    it. Sliding windows and soft-caps have a way of their own."""

    gradient_checkpointing: Annotated[bool | int | list[int], BeforeValidator(_every_n)] = option(
        False, aliases=("use_gradient_checkpointing", "activation_checkpointing")
    )
    """Recompute activations in backward to save memory: false, true (all blocks), n (every n-th), or a list of blocks."""

    torch_compile: bool | Literal["auto"] = option(False, aliases=("compile_model", "compile"))
    """Compile each block (needs a working compiler). auto: where steps measured before the first one say that it pays within
    this run; the answer is remembered for the machine, and kept by the run."""

    nonfinite_limit: int = option(5, ge=1)
    """A step whose loss or gradient is not finite is skipped and counted; what this many in a row do is on_nonfinite."""

    on_nonfinite: Literal["rollback", "stop"] = option("rollback")
    """What that does: rollback (to the last good checkpoint, skipping the rows in between; the third time stops) or stop."""

    on_spike: Literal["report", "skip", "rollback", "stop"] = option("report")
    """What a loss spike does: report, skip the update, roll back as above, or stop."""

    spike_sigmas: float = option(6.0, gt=0.0)
    """A loss this many deviations above the mean of the last 128 steps is a spike (after warm-up)."""

    step_timeout: float | None = option(None, gt=0.0)
    """Seconds after which a step counts as hung: all stacks go to stacks.txt and the process exits with 75."""

    objective: str = option("next_token", change="fixed")
    """What is learned: next_token, sft (conversations), dpo (preferences), or FILE.py:CLASS, a treadle.Objective of one's own with its keys in [task]."""

    callbacks: list[str] = option([])
    """Callbacks beside the built-in ones, each FILE.py:CLASS; one with the name of a built-in takes its place."""

    disabled_callbacks: list[str] = option([])
    """Built-in callbacks to leave out (sample, health, best_model, ...)."""

    loss_weights: dict[str, float] = option({})
    """Weight of each part of the loss by name; parts that are not named keep their own."""

    translations: ClassVar[dict[str, Callable[[Any], dict[str, Any]]]] = {
        "fp16": _boolean_precision("fp16"),
        "bf16": _boolean_precision("bf16"),
        # use_amp alone leaves the type to `auto`; amp_dtype (an alias of precision) names it.
        "use_amp": lambda value: {} if value is True else {"train.precision": "fp32"},
    }
    switches: ClassVar[dict[str, tuple[str, ...]]] = {"use_amp": ("amp_dtype",)}

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        every = self.gradient_checkpointing
        if isinstance(every, int) and not isinstance(every, bool) and every < 1:
            raise ValueError("gradient_checkpointing = n needs n >= 1")
        for name, table in (("batch_size_schedule", self.batch_size_schedule), ("seq_len_schedule", self.seq_len_schedule)):
            if table is None:
                continue
            sound = [row for row in table if len(row) == 2 and row[1] >= 1 and row[1] == int(row[1])]
            steps = [step for step, _ in sound if 0 <= step < 1 or step == int(step)]
            if steps[:1] != [0] or len(steps) < len(table) or any(b <= a for a, b in itertools.pairwise(steps)):
                raise ValueError(f"{name} is [[0, n], [step, n], ...] with growing steps (or shares of the run) and n >= 1")
        bad = [name for name, weight in self.loss_weights.items() if not 0 <= weight < float("inf")]
        if bad:
            raise ValueError(f"loss_weights.{bad[0]} must be a finite number >= 0")
        return self


class OptimSettings(Settings):
    """How the weights move."""

    name: Optimizer = option("adamw", aliases=("optimizer_name", "type"), change="guarded")
    """adamw (fused); or muon, normuon or soap for the hidden matrices, with adamw for everything else."""

    learning_rate: float = option(1e-3, aliases=("lr",), gt=0, lt=float("inf"), allow_inf_nan=False)
    """Peak learning rate."""

    lr_scheduler_type: Literal["cosine", "linear", "wsd", "constant"] = option(
        "cosine", aliases=("lr_scheduler", "scheduler", "schedule")
    )
    """How the rate falls after warm-up; wsd stays at the peak and falls in the last decay_fraction of the steps."""

    warmup_steps: int | None = option(None, ge=0)
    """Steps of linear rise; without it 2% of the run, at most 2000."""

    min_lr_ratio: float = option(0.1, ge=0.0, le=1.0)
    """The rate at the end as a share of the peak."""

    min_lr: float | None = option(None, aliases=("eta_min",), ge=0.0, allow_inf_nan=False)
    """The rate at the end as a number; overrides min_lr_ratio."""

    decay_fraction: float = option(0.2, gt=0.0, le=1.0)
    """Share of the steps in which wsd falls."""

    weight_decay: float = option(0.1, ge=0.0, allow_inf_nan=False)
    """Decoupled weight decay of matrices; norms, biases and whatever a model excludes have none."""

    adam_beta1: float = option(0.9, aliases=("beta1",), ge=0.0, lt=1.0)
    """Decay of AdamW's first moment."""

    adam_beta2: float = option(0.95, aliases=("beta2",), ge=0.0, lt=1.0)
    """Decay of AdamW's second moment, and of NorMuon's mean of squares."""

    adam_epsilon: float = option(1e-8, aliases=("epsilon", "eps"), gt=0.0, allow_inf_nan=False)
    """Added to AdamW's denominator."""

    muon_momentum: float = option(0.95, ge=0.0, lt=1.0)
    """Momentum of Muon and NorMuon."""

    soap_precondition_frequency: int = option(10, aliases=("precondition_frequency",), ge=1)
    """Steps between two refreshes of SOAP's eigenbases; both moments of SOAP decay as AdamW's."""

    ema: float | None = option(None, aliases=("ema_decay", "weight_average"), ge=0.0, lt=1.0, allow_inf_nan=False)
    """Decay of an exponential moving average of the weights (.999): evaluations, samples and checkpoints use the average, and
    training goes on from the weights themselves, which a checkpoint keeps too."""

    max_grad_norm: float = option(1.0, aliases=("grad_clip", "gradient_clip"), ge=0.0, allow_inf_nan=False)
    """Gradients are scaled down to this global norm; 0 turns clipping off."""

    translations: ClassVar[dict[str, Callable[[Any], dict[str, Any]]]] = {"betas": _betas, "adam_betas": _betas}
