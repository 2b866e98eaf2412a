"""The largest model that fits into a memory, and how: a search over presets, length, precision, checkpointing and rows.

Presets are tried from the largest down. Weights, gradients and optimiser state alone rule most of them out; activations are
traced for what is left. They grow with the rows along a straight line, so traces of one and two rows give all of them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from treadle.errors import ConfigError
from treadle.generation.reading import laid_out_bytes
from treadle.models.base import Model, ModelConfig, parameter_count
from treadle.models.catalogue import MODELS
from treadle.objectives.next_token import NextToken
from treadle.planning.memory import FP32, PROCESS_GB, Sizes, per_process, to_read
from treadle.planning.step_trace import Shape, StepTrace, trace_reading, trace_step, with_rows
from treadle.training.config import DEFAULT_ARCHITECTURE
from treadle.training.settings import OptimSettings

STATE_BYTES = 16  # of a parameter in training: weight, gradient and two moments in fp32
LEAST_BYTES = 8  # of one under another optimiser: weight and gradient
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
    global_batch: int = GLOBAL_BATCH

    @property
    def keys(self) -> dict[str, object]:
        """The same as dotted keys of a configuration."""
        found: dict[str, object] = {"model.arch": self.arch, "model.preset": self.preset, "data.seq_len": self.seq_len,
                                    "train.precision": self.precision}  # fmt: skip
        if not self.training:
            return found
        return {**found, "train.per_device_train_batch_size": self.rows,
                "train.gradient_accumulation_steps": self.global_batch // self.rows,
                "train.gradient_checkpointing": self.gradient_checkpointing}  # fmt: skip

    @property
    def typed_keys(self) -> dict[str, object]:
        """The keys that are typed: the preset's own recommended batch gives way to this one."""
        return {**self.keys, "train.global_batch_size": self.global_batch}

    def command(self, target: str | None = None, typed: Mapping[str, object] | None = None, files: Mapping[str, str] | None = None) -> str:
        """What to type. typed: dotted keys that were asked for beside; what the fit decides replaces them. files: recipes that flags name."""
        words = ["treadle", "train", *([target or "FILE.txt"] if target or not files else [])]
        words += [word for name, file in (files or {}).items() for word in (f"--{name}", file)]
        for key, value in {**(typed or {}), **self.typed_keys}.items():
            words += [f"--{key}", _as_typed(value)]
        return shlex.join(words)


def _as_typed(value: object) -> str:
    """A value as the command line reads it."""
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


Composed = Callable[[str], tuple[ModelConfig, OptimSettings]]  # a preset's name -> its model and optimiser, other keys included


class Preset:
    """One preset of an architecture, with the traces of its steps as they are asked for."""

    def __init__(self, arch: str, name: str, kind: str, composed: Composed | None = None, global_batch: int = GLOBAL_BATCH) -> None:
        self.arch, self.name, self.kind, self.global_batch = arch, name, kind, global_batch
        self.cls: type[Model] = MODELS.get(arch)
        self.config: ModelConfig = self.cls.Config.with_preset(name)
        self.optim = OptimSettings()
        if composed is not None:
            self.config, self.optim = composed(name)
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
                           self.cls.example(self.config, n, length), optim=self.optim, kind=self.kind) for n in (1, 2)
            )  # fmt: skip
            self._traces[key] = (one, two)
        shape = Shape(rows, length, self.global_batch // rows, precision, checkpointing)
        return per_process(self.sizes, with_rows(*self._traces[key], rows), shape, "none", 1, None, kind=self.kind).total_gb

    def may_train(self, room_gb: float, rows: int, length: int, precisions: Sequence[str], checkpointing: bool | None) -> bool:
        """Whether the way that needs the least trains within the room: said at once for all lengths and numbers of rows above these,
        and before anything is traced where weights, gradients and state alone are too large."""
        if self.sizes.parameters * least_bytes(self.optim) / 1e9 + PROCESS_GB[self.kind] > room_gb:
            return False
        again = True if checkpointing is None else checkpointing
        return any(self.training_gb(rows, min(length, self.longest()), precision, again) <= room_gb for precision in precisions)

    def reading_gb(self, rows: int, length: int) -> float:
        """Gigabytes of one process that generates `rows` texts of `length` tokens at once."""
        activations = trace_reading(self.cls, self.config, self.cls.example(self.config, rows, length), self.kind)
        return to_read(self.sizes, self.model.state_bytes(rows, length), activations, self.kind,
                       laid_out_bytes(self.model, "fp32", self.kind))["total_gb"]  # fmt: skip

    def fit(
        self, memory_gb: float, length: int, precisions: Sequence[str], checkpointing: bool | None = None, counts: Sequence[int] = ROWS
    ) -> Fit | None:
        """Rows of `length` that train in this memory, of the numbers in `counts` (the most first): recomputing only where few rows fit
        without, a further precision only where the one before does not fit."""
        room = USED * memory_gb
        if length > self.longest():
            return None
        for precision in precisions:
            found: Fit | None = None
            for again in (False, True) if checkpointing is None else (checkpointing,):
                for rows in counts:
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

    def reads(self, memory_gb: float, length: int, counts: Sequence[int] = ROWS) -> Fit | None:
        """Texts of `length` tokens that are generated at once in this memory."""
        if length > self.longest() or self.sizes.parameters * FP32 / 1e9 + PROCESS_GB[self.kind] > USED * memory_gb:
            return None
        for rows in counts:
            need = self.reading_gb(rows, length)
            if need <= USED * memory_gb:
                return Fit(self.arch, self.name, self.sizes.parameters, length, "fp32", False, rows, need, training=False)
        return None


def least_bytes(optim: OptimSettings) -> int:
    """Bytes of a parameter in training that no way of training goes below."""
    return STATE_BYTES if optim.name == "adamw" else LEAST_BYTES


def presets_of(arch: str) -> list[tuple[str, int]]:
    """(preset, parameters), the largest first."""
    cls = MODELS.get(arch)
    counts = [(name, parameter_count(cls, cls.Config.with_preset(name))) for name in cls.Config.presets()]
    return sorted(counts, key=lambda item: -item[1])


@dataclass(frozen=True)
class Asked:
    """What was said beside the memory: a search keeps to it. composed: a preset's model and optimiser under the other keys;
    needs: gigabytes of a fit by the plan of the very command, which has the last word."""

    preset: str | None = None
    checkpointing: bool | None = None
    rows: int | None = None
    global_batch: int = GLOBAL_BATCH
    composed: Composed | None = None
    needs: Callable[[Fit], float] | None = None

    def counts(self, training: bool) -> list[int]:
        """Rows at once that are tried, the most first; in training those that make up a step."""
        tried = ROWS if self.rows is None else (self.rows,)
        return [n for n in tried if not training or self.global_batch % n == 0]


def what_fits(
    memory_gb: float, arch: str = DEFAULT_ARCHITECTURE, lengths: Sequence[int] = (1024,), precisions: Sequence[str] = ("bf16",),
    *, training: bool = True, kind: str = "cuda", asked: Asked = Asked(),
) -> Fit:  # fmt: skip
    """The largest preset that trains (training=False: generates) in `memory_gb` * 1e9 bytes, on the first of `lengths` that
    it takes, in the first of `precisions` that fits. ConfigError, with what to type next, where none does."""
    name = MODELS.canonical(arch)
    known = presets_of(arch)
    if not known:
        raise ConfigError(f"{name} has no presets to recommend; give the shape yourself: --num_layers, --hidden_size")
    chosen = _suited(name, [(p, n) for p, n in known if asked.preset in (None, p)], asked.composed)
    if not chosen:
        raise ConfigError(f"{name} has no preset {asked.preset!r}; give one of {', '.join(p for p, _ in known)}")
    counts = asked.counts(training)
    if not counts:
        raise ConfigError(f"a step of {asked.global_batch} rows is no multiple of {asked.rows} rows; leave out --batch_size or --global_batch_size")
    for each, count in chosen:
        least = LEAST_BYTES if training else FP32
        if count * least / 1e9 + PROCESS_GB[kind] > USED * memory_gb:
            continue
        tried = Preset(name, each, kind, asked.composed, asked.global_batch)
        if training and not tried.may_train(USED * memory_gb, min(counts), min(lengths), precisions, asked.checkpointing):
            continue
        for length in lengths:
            found = (tried.fit(memory_gb, length, precisions, asked.checkpointing, counts) if training
                     else tried.reads(memory_gb, length, counts))  # fmt: skip
            found = _confirmed(found, asked, counts, USED * memory_gb) if found is not None else None
            if found is not None:
                return found
    said = f"{asked.preset} of {name}" if asked.preset else f"no preset of {name}"
    verb = ("trains" if training else "runs") if asked.preset is None else ("does not train" if training else "does not run")
    rows = f"{asked.rows} row(s)" if asked.rows is not None else "rows"
    raise ConfigError(f"{said} {verb} in {memory_gb:g} GB with {rows} of {lengths[-1]} tokens (the smallest is {known[-1][0]}); "
                      f"use shorter rows (--seq_len {max(16, lengths[-1] // 4)}), or give the shape yourself: --num_layers, "
                      "--hidden_size")  # fmt: skip


def _suited(arch: str, presets: list[tuple[str, int]], composed: Composed | None) -> list[tuple[str, int]]:
    """The presets that the other keys go with, with their parameters under these; ConfigError where there is none."""
    if composed is None:
        return presets
    found, problem = [], None
    for name, _ in presets:
        try:
            found.append((name, parameter_count(MODELS.get(arch), composed(name)[0])))
        except ConfigError as refused:
            problem = problem or refused
    if problem is not None and not found:
        raise problem
    return sorted(found, key=lambda item: -item[1])


def _confirmed(found: Fit, asked: Asked, counts: Sequence[int], room: float) -> Fit | None:
    """The fit, with fewer rows where the whole plan needs more than the search saw (another objective, a schedule of the batch)."""
    if asked.needs is None:
        return replace(found, global_batch=asked.global_batch)
    for rows in (n for n in counts if n <= found.rows):
        fewer = replace(found, rows=rows, global_batch=asked.global_batch)
        need = asked.needs(fewer)
        if need <= room:
            return replace(fewer, total_gb=need)
    return None


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
