"""The largest model that fits into a memory, and how: a search over presets, length, precision, checkpointing and rows.

Presets are tried from the largest down. Weights, gradients and optimiser state alone rule most of them out; activations are
traced for what is left. They grow with the rows along a straight line, so traces of one and two rows give all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from treadle.errors import ConfigError
from treadle.models.base import Model, ModelConfig, parameter_count
from treadle.models.catalogue import MODELS
from treadle.objectives.next_token import NextToken
from treadle.planning.memory import FP32, PROCESS_GB, Sizes, per_process, to_read
from treadle.planning.step_trace import Shape, StepTrace, trace_reading, trace_step, with_rows
from treadle.training.config import DEFAULT_ARCHITECTURE

STATE_BYTES = 16  # of a parameter in training: weight, gradient and two moments in fp32
GLOBAL_BATCH = 64  # rows of a step; what does not fit at once is accumulated
ROWS = (64, 32, 16, 8, 4, 2, 1)
ENOUGH_ROWS = 4  # at once: below this, recomputing (a third more work) pays for more rows
USED = 0.95  # of the memory is planned with; the estimate's error takes the rest
PRECISIONS = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Fit:
    """One way to train (or to generate with) a preset within a memory."""

    arch: str
    preset: str
    parameters: int
    seq_len: int
    precision: str
    gradient_checkpointing: bool
    rows: int
    total_gb: float
    training: bool = True

    @property
    def keys(self) -> dict[str, object]:
        """The same as dotted keys of a configuration."""
        found: dict[str, object] = {"model.arch": self.arch, "model.preset": self.preset, "data.seq_len": self.seq_len,
                                    "train.precision": self.precision}  # fmt: skip
        if not self.training:
            return found
        return {**found, "train.per_device_train_batch_size": self.rows,
                "train.gradient_accumulation_steps": GLOBAL_BATCH // self.rows,
                "train.gradient_checkpointing": self.gradient_checkpointing}  # fmt: skip

    def command(self, target: str | None = None) -> str:
        """What to type. Global batch and row length of the preset's own recommendation give way to these."""
        words = ["treadle train", target or "FILE.txt"]
        for key, value in {**self.keys, "train.global_batch_size": GLOBAL_BATCH}.items():
            words.append(f"--{key} {str(value).lower() if isinstance(value, bool) else value}")
        return " ".join(words)


class Preset:
    """One preset of an architecture, with the traces of its steps as they are asked for."""

    def __init__(self, arch: str, name: str, kind: str) -> None:
        self.arch, self.name, self.kind = arch, name, kind
        self.cls: type[Model] = MODELS.get(arch)
        self.config: ModelConfig = self.cls.Config.with_preset(name)
        with torch.device("meta"):
            self.model = self.cls(self.config)
        self.sizes = Sizes.of(self.model)
        self._traces: dict[Any, tuple[StepTrace, StepTrace]] = {}

    def longest(self) -> int:
        """Positions that the model was made for; what has no such limit takes any."""
        return getattr(self.config, "max_position_embeddings", None) or 1 << 30

    def training_gb(self, rows: int, length: int, precision: str, checkpointing: bool) -> float:
        """Gigabytes of one process that trains on `rows` rows at once."""
        key = (length, precision, checkpointing)
        if key not in self._traces:
            one, two = (
                trace_step(self.cls, self.config, NextToken(), Shape(n, length, 2, precision, checkpointing),
                           self.cls.example(self.config, n, length), kind=self.kind) for n in (1, 2)
            )  # fmt: skip
            self._traces[key] = (one, two)
        shape = Shape(rows, length, GLOBAL_BATCH // rows, precision, checkpointing)
        return per_process(self.sizes, with_rows(*self._traces[key], rows), shape, "none", 1, None, kind=self.kind).total_gb

    def reading_gb(self, rows: int, length: int) -> float:
        """Gigabytes of one process that generates `rows` texts of `length` tokens at once."""
        activations = trace_reading(self.cls, self.config, self.cls.example(self.config, rows, length), self.kind)
        return to_read(self.sizes, self.model.state_bytes(rows, length), activations, self.kind)["total_gb"]

    def fit(self, memory_gb: float, length: int, precisions: Sequence[str], checkpointing: bool | None = None) -> Fit | None:
        """Rows of `length` that train in this memory: recomputing only where few rows fit without, a further precision only
        where the one before does not fit."""
        room = USED * memory_gb
        if self.sizes.parameters * STATE_BYTES / 1e9 + PROCESS_GB[self.kind] > room or length > self.longest():
            return None
        for precision in precisions:
            found: Fit | None = None
            for again in (False, True) if checkpointing is None else (checkpointing,):
                for rows in ROWS:
                    need = self.training_gb(rows, length, precision, again)
                    if need <= room:
                        if found is None or rows > found.rows:
                            found = Fit(self.arch, self.name, self.sizes.parameters, length, precision, again, rows, need)
                        break
                if found is not None and found.rows >= ENOUGH_ROWS:
                    break
            if found is not None:
                return found
        return None

    def reads(self, memory_gb: float, length: int) -> Fit | None:
        """Texts of `length` tokens that are generated at once in this memory."""
        if length > self.longest() or self.sizes.parameters * FP32 / 1e9 + PROCESS_GB[self.kind] > USED * memory_gb:
            return None
        for rows in ROWS:
            need = self.reading_gb(rows, length)
            if need <= USED * memory_gb:
                return Fit(self.arch, self.name, self.sizes.parameters, length, "fp32", False, rows, need, training=False)
        return None


def presets_of(arch: str) -> list[tuple[str, int]]:
    """(preset, parameters), the largest first."""
    cls = MODELS.get(arch)
    counts = [(name, parameter_count(cls, cls.Config.with_preset(name))) for name in cls.Config.presets()]
    return sorted(counts, key=lambda item: -item[1])


def what_fits(
    memory_gb: float, arch: str = DEFAULT_ARCHITECTURE, lengths: Sequence[int] = (1024,), precisions: Sequence[str] = ("bf16",),
    *, training: bool = True, kind: str = "cuda", preset: str | None = None, checkpointing: bool | None = None,
) -> Fit:  # fmt: skip
    """The largest preset that trains (training=False: generates) in `memory_gb` * 1e9 bytes, on the first of `lengths` that
    it takes, in the first of `precisions` that fits. ConfigError, with what to type next, where none does."""
    name = MODELS.canonical(arch)
    known = presets_of(arch)
    if not known:
        raise ConfigError(f"{name} has no presets to recommend; give the shape yourself: --num_layers, --hidden_size")
    chosen = [(p, n) for p, n in known if preset is None or p == preset]
    if not chosen:
        raise ConfigError(f"{name} has no preset {preset!r}; give one of {', '.join(p for p, _ in known)}")
    for each, count in chosen:
        least = STATE_BYTES if training else FP32
        if count * least / 1e9 + PROCESS_GB[kind] > USED * memory_gb:
            continue
        tried = Preset(name, each, kind)
        for length in lengths:
            found = tried.fit(memory_gb, length, precisions, checkpointing) if training else tried.reads(memory_gb, length)
            if found is not None:
                return found
    said = f"{preset} of {name}" if preset else f"no preset of {name}"
    verb = ("trains" if training else "runs") if preset is None else ("does not train" if training else "does not run")
    raise ConfigError(f"{said} {verb} in {memory_gb:g} GB with rows of {lengths[-1]} tokens (the smallest is {known[-1][0]}); "
                      f"use shorter rows (--seq_len {max(16, lengths[-1] // 4)}), or give the shape yourself: --num_layers, "
                      "--hidden_size")  # fmt: skip


def recommend(
    vram_gb: float, training: bool = True, arch: str = DEFAULT_ARCHITECTURE, seq_len: int = 1024, precision: str = "bf16"
) -> dict[str, object]:
    """Dotted keys of a configuration: the largest preset of `arch` that trains (or, training=False, generates) in
    `vram_gb` * 1e9 bytes of one GPU on rows of `seq_len` tokens. ConfigError where none does."""
    if not isinstance(vram_gb, (int, float)) or isinstance(vram_gb, bool) or not 0 < vram_gb < float("inf"):
        raise ConfigError(f"vram_gb = {vram_gb!r}: give the gigabytes of one device, as in vram_gb=12")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision = {precision!r}: give one of {', '.join(PRECISIONS)}")
    found = what_fits(vram_gb, arch, (seq_len,), (precision,), training=training).keys
    return {**found, "train.precision": precision}
