"""One training step over tensors without contents: what is alive at its fullest moments, for any size on any machine.

Exact: the whole model. Quick: models of the first two and three periods of blocks (the shortest pattern that the blocks
repeat), whose difference is what each further period adds; every moment of a step grows with depth along a straight line.
Nothing here knows an architecture: blocks are told apart by their parameters' shapes, their modules and their settings.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from treadle.data.batch import Batch
from treadle.models.adapters import made
from treadle.models.base import Model, ModelConfig
from treadle.models.settings import AdapterSettings
from treadle.objectives.base import ModelWithObjective, Objective
from treadle.ops.planned import planned_for
from treadle.ops.precision import autocast
from treadle.planning.ledger import Ledger, Moment, Watch, leaf_of, storages
from treadle.training import resolve
from treadle.training.optim import Optimizers
from treadle.training.settings import OptimSettings

NUMBERING = ("layer", "index", "layer_index", "layer_idx", "number")  # attributes that only number a block


@dataclass(frozen=True)
class Shape:
    """What decides the memory of one step."""

    micro_batch: int
    length: int
    accumulation: int
    precision: str
    gradient_checkpointing: bool | int | list[int]


@dataclass(frozen=True)
class StepTrace:
    """The fullest moments of a step; bytes. blocks: what each leaves saved for its backward pass. logits: what the loss
    holds beyond what it begins with. exact: of the whole model."""

    moments: tuple[Moment, ...]
    state: float  # of the optimiser
    gradients: float
    blocks: tuple[float, ...]
    logits: float
    exact: bool
    products: int = 0  # kinds of products of bf16 matrices


def trace_step(
    cls: type[Model], config: ModelConfig, objective: Objective, shape: Shape, batch: Batch, *,
    optim: OptimSettings | None = None, exact: bool = False, kind: str = "cpu", adapter: AdapterSettings | None = None,
) -> StepTrace:  # fmt: skip
    """The step of a micro-batch. exact=False: from two shallow models where the blocks repeat, else the whole model.
    kind: "cuda" takes attention that saves no probabilities, as GPUs have it. adapter: of a model that is frozen under adapters."""
    optim = optim or OptimSettings()

    def traced(config: ModelConfig) -> StepTrace:
        with planned_for(kind):
            return _trace(cls, config, objective, shape, batch, optim, adapter)

    numbered = adapter is not None and any(character.isdigit() for word in adapter.lora_targets for character in word)
    period, count = (0, 0) if exact or numbered else period_of(cls, config)
    if not period or count <= 3 * period or not isinstance(shape.gradient_checkpointing, bool):
        return traced(config)
    two, three = (traced(config.model_copy(update={"num_layers": n * period})) for n in (2, 3))
    return _deeper(two, three, period, count)


def period_of(cls: type[Model], config: ModelConfig) -> tuple[int, int]:
    """(blocks after which the pattern repeats, blocks); (0, blocks) where a shorter model cannot be had by `num_layers`."""
    key = f"{cls.__module__}.{cls.__qualname__} {config.model_dump_json()}"
    if key not in _periods:
        _periods[key] = _period_of(cls, config)
    return _periods[key]


_periods: dict[str, tuple[int, int]] = {}  # making a deep model takes longer than tracing two blocks of it


def _period_of(cls: type[Model], config: ModelConfig) -> tuple[int, int]:
    with torch.device("meta"):
        blocks = cls(config).blocks()
    if getattr(config, "num_layers", None) != len(blocks):
        return 0, len(blocks)
    looks = [_look_of(block) for block in blocks]
    period = next(p for p in range(1, len(blocks) + 1) if all(look == looks[i % p] for i, look in enumerate(looks)))
    try:
        for count in (2 * period, 3 * period):
            with torch.device("meta"):
                shorter = cls(config.model_copy(update={"num_layers": count})).blocks()
            if [_look_of(block) for block in shorter] != looks[:count]:
                return 0, len(blocks)
    except Exception:  # a pattern written out for every block, say: the whole model is traced instead
        return 0, len(blocks)
    return period, len(blocks)


def _look_of(block: nn.Module) -> list[Any]:
    """What two equal blocks have in common; settings that only number them are left out."""
    look: list[Any] = [(name, tuple(p.shape)) for name, p in block.named_parameters()]
    for module in block.modules():
        settings = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, str)) and k not in NUMBERING}
        look.append((type(module).__name__, settings))
    return look


def _deeper(two: StepTrace, three: StepTrace, period: int, count: int) -> StepTrace:
    """`count` blocks, from two and three periods. One would not do: its block is the first and the last, and what its backward pass
    holds at most (the gradients of the embedding) is of neither alone."""
    further = count / period - 2

    def along(a: float, b: float) -> float:
        return a + further * (b - a)

    moments = []
    for first, second in zip(_ends(two, 2 * period), _ends(three, 3 * period), strict=True):
        block = count - 1 if second.block == 3 * period - 1 else second.block
        moments.append(Moment(second.part, block, along(first.activations, second.activations), along(first.gradients, second.gradients),
                              along(first.casts, second.casts)))  # fmt: skip
    blocks = tuple(three.blocks[period + i % period] if i else three.blocks[0] for i in range(count))
    return StepTrace(tuple(moments), along(two.state, three.state), along(two.gradients, three.gradients), blocks, three.logits, False,
                     three.products)  # fmt: skip


def _ends(trace: StepTrace, count: int) -> list[Moment]:
    """The moments that every depth has: of the first and of the last period of blocks, and of what is around them."""
    found = []
    for part in ("embedding", "forward", "loss", "backward", "optimiser step"):
        own = [m for m in trace.moments if m.part == part]
        if part not in ("forward", "backward"):
            found += own
            continue
        for end in (0, count - 1):
            found += [m for m in own if m.block == end]
    return found


def with_rows(one: StepTrace, two: StepTrace, rows: int) -> StepTrace:
    """A step of `rows` rows, from traces of one and of two: activations along a straight line, moment by moment; gradients and
    casts have the parameters' sizes."""

    def along(a: float, b: float) -> float:
        return a + (rows - 1) * (b - a)

    moments = tuple(
        replace(a, activations=along(a.activations, b.activations), gradients=max(a.gradients, b.gradients), casts=max(a.casts, b.casts))
        for a, b in zip(one.moments, two.moments, strict=True)
    )
    blocks = tuple(along(a, b) for a, b in zip(one.blocks, two.blocks, strict=True))
    return StepTrace(moments, one.state, one.gradients, blocks, max(one.logits, along(one.logits, two.logits)), False,
                     one.products)  # fmt: skip


def trace_reading(cls: type[Model], config: ModelConfig, batch: Batch, kind: str = "cpu") -> float:
    """Most bytes alive in the pass over a prompt without gradients, beyond weights and the decoding state; they do not grow
    with depth, so that two periods of blocks (`period_of` has seen that they can be had) tell them."""
    period, count = period_of(cls, config)
    shorter = config.model_copy(update={"num_layers": 2 * period}) if period and count > 2 * period else config
    ledger = Ledger()
    with planned_for(kind), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = cls(shorter).eval()
        ledger.sort([*model.parameters(), *model.buffers()], "kept")
        with Watch(ledger):
            model.hidden(batch)
    return max((moment.activations for moment in ledger.moments()), default=0.0)


def _trace(
    cls: type[Model], config: ModelConfig, objective: Objective, shape: Shape, batch: Batch, optim: OptimSettings,
    adapter: AdapterSettings | None = None,
) -> StepTrace:  # fmt: skip
    ledger = Ledger()
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")
        model = made(cls, config, adapter)
        resolve.set_checkpointing(model, shape.gradient_checkpointing)
        if shape.precision == "fp8":
            resolve.use_fp8(model)
        module = ModelWithObjective(model, objective).train()
        optimizers = Optimizers(model, optim)
        ledger.sort([*model.parameters(), *model.buffers()], "kept")
        for parameter in [p for p in model.parameters() if p.requires_grad]:
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.sort([p.grad], "gradients"))
        with Watch(ledger), _marked(model, ledger) as begin_backward:
            with autocast(shape.precision, torch.device("cpu")):
                parts = module(batch)
            total = sum(part.total for part in parts.losses.values())
            begin_backward()
            total.backward()
            del total, parts
            ledger.mark("first optimiser step")
            optimizers.step()
            ledger.sort(optimizers.state_tensors().values(), "kept")  # the first step makes it; later ones find it
            ledger.mark("optimiser step")
            optimizers.step()
        state = storages(optimizers.state_tensors().values())
        gradients = storages(p.grad for p in model.parameters() if p.grad is not None)
    moments = [m for m in ledger.moments() if m.part != "first optimiser step"]
    count = len(model.blocks())
    entered = [ledger.entered.get(("forward", i), 0) for i in range(count)] + [ledger.entered.get(("loss", 0), 0)]
    blocks = tuple(float(max(0, b - a)) for a, b in itertools.pairwise(entered))
    logits = max((m.activations for m in moments if m.part == "loss"), default=0) - entered[-1]
    return StepTrace(tuple(moments), state, gradients, blocks, max(0.0, logits), True, len(ledger.products))


@contextmanager
def _marked(model: Model, ledger: Ledger) -> Iterator[Any]:
    """Tells the ledger which block the step is in; gives what to call where the backward pass begins."""
    blocks, begun = model.blocks(), []

    def begin_backward() -> None:
        begun.append(True)

    def on_the_way(index: int) -> tuple[Any, Any]:
        def before(module: nn.Module, given: Any) -> None:
            if not begun:  # a block that recomputes runs forward again, in its backward pass
                ledger.mark("forward", index)

        def after(module: nn.Module, given: Any, made: Any) -> None:
            if begun:
                return
            if index + 1 == len(blocks):
                ledger.mark("loss")
            leaf = leaf_of(made)
            if leaf is not None:
                leaf.register_hook(lambda _: ledger.mark("backward", index))

        return before, after

    handles = []
    for index, block in enumerate(blocks):
        before, after = on_the_way(index)
        handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    if not blocks:
        ledger.mark("loss")
    ledger.mark("embedding")
    try:
        yield begin_backward
    finally:
        for handle in handles:
            handle.remove()
