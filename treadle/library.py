"""The functions of the Python interface that are not a class of some room."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from treadle import terminal, trusted_code
from treadle.data.batch import IGNORE, Batch
from treadle.errors import ConfigError
from treadle.models.base import Model as BaseModel
from treadle.models.base import Output, build, count_label
from treadle.models.catalogue import MODELS
from treadle.models.pretrained import load_model, load_run, pick_device
from treadle.monitor.console import Console
from treadle.ops.memory import peak_resident_bytes, resident_bytes
from treadle.planning.command import names_tokenizer, taken
from treadle.planning.plan import plan as make_plan
from treadle.recipe import Layer, compose
from treadle.registry import nearest
from treadle.settings import shown
from treadle.start import Request
from treadle.start import train as run_training
from treadle.text.base import Tokenizer
from treadle.training.config import DEFAULT_ARCHITECTURE, Recipe
from treadle.training.resolve import set_checkpointing

PLAN_KEYS = ("flops", "bandwidth", "overlap", "memory", "device", "rehearse", "exact", "inference", "gpu", "utilisation", "measure",
             "tokens", "hours", "weights")  # fmt: skip


class Model(BaseModel, abstract=True):
    """Base of models of one's own, and `Model.load(run | folder)`: a trained model; a preset's name needs pretrained=False and gives random weights."""

    @staticmethod
    def load(
        source: str | Path, device: Any = None, pretrained: bool = True, preset: str | None = None,
        trust_code: Sequence[str] = (), **keys: Any,
    ) -> BaseModel:  # fmt: skip
        """source: a run, a checkpoint, a model folder, or a preset's name (or an architecture with `preset`).
        ConfigError for such a name without it, and for keys that a trained model has already."""
        known = ["source", "device", "pretrained", "preset", "trust_code"]
        for key, value in keys.items():
            raise ConfigError(f"Model.load: {key} = {shown(value)}: {nearest(key, known)} A model's own keys are kept with its "
                              "weights; treadle.build(arch, preset, key=value) makes another one")  # fmt: skip
        trusted_code.allow(trust_code)
        if preset is not None:
            if pretrained:
                raise ConfigError(f"preset = {preset!r} is a shape without weights: give a run or a model folder for trained "
                                  "weights, or say pretrained=False for random ones")  # fmt: skip
            return build(str(source), preset, device=pick_device(device or "auto"))
        return load_model(str(source), device, pretrained)


def architectures() -> list[str]:
    """Names of all registered architectures."""
    return MODELS.names()


def load(run: str | Path, trust_code: Sequence[str] = ()) -> tuple[BaseModel, Tokenizer | None]:
    """The trained model and the tokenizer of a run (a folder, a checkpoint, `last`, RUN@best, RUN@STEP); None for a model
    that reads no text. trust_code: the files of code that the run may execute, where it names some and is not this user's
    own."""
    trusted_code.allow(trust_code)
    loaded = load_run(str(run))
    return loaded.model, loaded.tokenizer


def _target(recipe: Any) -> str | Mapping[str, Any] | None:
    """What `train` and `plan` take, as a request has it; of a TrainConfig what was set in it."""
    if recipe is None or isinstance(recipe, Mapping):
        return recipe
    if isinstance(recipe, Recipe):
        return recipe.set_values()
    if isinstance(recipe, (str, os.PathLike)):
        return os.fspath(recipe)
    raise ConfigError(f"recipe = {shown(recipe)}: give a recipe's or text's path, a dictionary of keys, or a treadle.TrainConfig")


def train(
    recipe: str | Path | Recipe | Mapping[str, Any] | None = None, *, quiet: bool = False, allow_change: Sequence[str] = (),
    trust_code: Sequence[str] = (), **keys: Any,
) -> dict[str, Any]:  # fmt: skip
    """What `treadle train` does, with keys of the configuration as keyword arguments; returns the summary. recipe: a
    path, a built-in name, a recipe's table as a dictionary, or a TrainConfig. ConfigError for keys that there are not."""
    request = Request(_target(recipe), keys, allow_change=allow_change, flags_are_text=False, trust_code=trust_code,
                      other_flags=("quiet", "allow_change", "trust_code"))  # fmt: skip
    return run_training(request, Console(quiet=quiet))


def plan(
    recipe: str | Path | Recipe | Mapping[str, Any] | BaseModel | None = None, world: int | None = None, *,
    trust_code: Sequence[str] = (), **keys: Any,
) -> dict[str, Any]:  # fmt: skip
    """What `treadle plan` says, as numbers; prints nothing. recipe: what `train` takes, or a model; keys: of the
    configuration (batch_size, seq_len, ...), or flops, bandwidth, overlap, memory, device, rehearse, exact, inference, gpu,
    utilisation, measure, tokens, hours and weights of planning/plan.py."""
    trusted_code.allow(trust_code)
    own = taken(keys, PLAN_KEYS)
    if isinstance(recipe, BaseModel):
        own["model_class"] = (type(recipe), recipe.config)
        own.setdefault("device", recipe.device.type if recipe.device.type == "cuda" else "cpu")
        marked = _recomputing(recipe)
        recipe = {"gradient_checkpointing": marked} if marked is not False else {}
    text_named, of_table = isinstance(recipe, (str, Path)), "recipe" if isinstance(recipe, Mapping) else None
    if not isinstance(recipe, Recipe) or keys:
        request = Request(_target(recipe), keys, flags_are_text=False, other_flags=("world", "trust_code", *PLAN_KEYS))
        recipe = compose(request.layers())
        text_named = text_named or names_tokenizer(recipe, of_table)
    return make_plan(recipe, world, text_named=text_named, **own)


def _recomputing(model: BaseModel) -> bool | list[int]:
    """Which blocks are marked to recompute, as the key gradient_checkpointing says it."""
    blocks = model.blocks()
    marked = [n for n, block in enumerate(blocks) if getattr(block, "gradient_checkpointing", False)]
    return len(marked) == len(blocks) or marked if marked else False


def loss(out: Output, batch: Batch) -> tuple[Tensor, int]:
    """(sum of nats over labels, number of labels); the caller divides, over as many batches as it likes. Logits [B, T,
    V], labels [B, T]; ConfigError where one of them is missing."""
    import torch.nn.functional as F

    if batch.labels is None or out.logits is None:
        raise ConfigError("loss needs logits and labels; make the batch with Batch.for_training(ids)")
    total = F.cross_entropy(
        out.logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return total, batch.counts["labels"]


def count_params(model: BaseModel, trainable_only: bool = False) -> int:
    """Parameters of a model, shared ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def memory_usage(model: BaseModel | None = None) -> dict[str, float]:
    """Gigabytes (1e9 bytes) now: of the process, its peak, what torch holds on the current GPU (0 without one), allocated_gb
    (of the two the one that runs out first: the GPU's, or the process's without one), and of the model's parameters, gradients and buffers where one is given."""
    import torch

    on_gpu = torch.cuda.is_available()
    sizes = {"process_gb": float(resident_bytes()), "peak_gb": float(peak_resident_bytes()),
             "gpu_gb": float(torch.cuda.memory_allocated()) if on_gpu else 0.0}  # fmt: skip
    sizes["allocated_gb"] = sizes["gpu_gb"] if on_gpu else sizes["process_gb"]
    if model is not None:
        sizes["parameters_gb"] = float(sum(p.nbytes for p in model.parameters()))
        sizes["gradients_gb"] = float(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))
        sizes["buffers_gb"] = float(sum(b.nbytes for b in model.buffers()))
    return {name: size / 1e9 for name, size in sizes.items()}


def estimate_memory(
    model: BaseModel, batch_size: int, seq_len: int, *, precision: str = "fp32", optimizer: str = "adamw",
    training: bool = True, gradient_checkpointing: bool | int | list[int] | None = None, exact: bool = False,
) -> dict[str, float | str]:  # fmt: skip
    """Gigabytes (1e9 bytes) that one process needs by kind, `total_gb` at the peak, traced on tensors without contents.

    gradient_checkpointing: what the model's blocks say when left out. training=False: weights and a decoding state of
    `batch_size` rows of `seq_len` tokens. exact: the whole model is traced, not two and three of its repeating blocks.
    """
    from treadle.generation.reading import laid_out_bytes
    from treadle.objectives.next_token import NextToken
    from treadle.planning.memory import Sizes, per_process, to_read
    from treadle.planning.step_trace import Shape, trace_reading, trace_step
    from treadle.training.settings import OptimSettings

    kind = "cuda" if model.device.type == "cuda" else "cpu"
    batch = model.example(model.config, batch_size, seq_len)
    if not training:
        read = trace_reading(type(model), model.config, batch, kind)
        laid_out = laid_out_bytes(model, "fp32", kind)
        return dict(to_read(Sizes.of(model), model.state_bytes(batch_size, seq_len), read, kind, laid_out))
    again = _recomputing(model) if gradient_checkpointing is None else gradient_checkpointing
    shape = Shape(batch_size, seq_len, 1, precision, again)
    trace = trace_step(type(model), model.config, NextToken(), shape, batch, optim=OptimSettings.model_validate({"name": optimizer}), exact=exact, kind=kind)
    return per_process(Sizes.of(model), trace, shape, "none", 1, None, kind=kind).to_dict()


def recommend_config(
    vram_gb: float, training: bool = True, arch: str = DEFAULT_ARCHITECTURE, seq_len: int = 1024, precision: str = "bf16"
) -> Recipe:
    """A TrainConfig of the largest preset of `arch` that trains (training=False: generates) in `vram_gb` gigabytes of one
    GPU; .preset, .train.per_device_train_batch_size and so on are what was chosen. ConfigError where nothing fits."""
    from treadle.planning.recommend import recommend

    return compose([Layer(recommend(vram_gb, training, arch, seq_len, precision), f"recommended for {vram_gb:g} GB")])


def summary(model: BaseModel) -> dict[str, Any]:
    """Architecture, parameters (in all, trainable, of each block), bytes, floating-point operations of a token."""
    blocks = [count_params(block) for block in model.blocks()]  # type: ignore[arg-type]
    total = count_params(model)
    return {"architecture": model.arch, "parameters": total, "trainable": count_params(model, True), "blocks": blocks,
            "outside_blocks": total - sum(blocks), "bytes": sum(p.nbytes for p in model.parameters()),
            "flops_per_token": 3.0 * model.flops(1024) / 1024}  # fmt: skip


def print_summary(model: BaseModel) -> dict[str, Any]:
    """Prints `summary(model)` for people and returns its numbers."""
    found = summary(model)
    terminal.write(f"{found['architecture']}: {found['parameters']:,} parameters ({count_label(found['parameters'])}), "
                   f"{found['bytes'] / 1e6:.1f} MB")  # fmt: skip
    for name, child in model.named_children():
        terminal.write(f"  {name:<20}{count_params(child):>15,}  {type(child).__name__}")  # type: ignore[arg-type]
    terminal.write(f"  {len(found['blocks'])} blocks; {found['flops_per_token'] / 1e6:.1f} million operations to train on one token")
    return found


def enable_checkpointing(model: BaseModel, every: bool | int | list[int] = True) -> None:
    """Blocks recompute their activations in backward, for memory: all, none (False), every n-th, or a list of blocks. One
    block alone: model.blocks()[i].gradient_checkpointing = True."""
    set_checkpointing(model, every)


def autocast(precision: str = "auto", device: Any = "cpu", width: int = 1024) -> AbstractContextManager[Any]:
    """Mixed precision around the forward pass and the loss of a hand-written loop: fp32, bf16, fp16, or auto, which is bf16
    where it is known to pay for a model of this width. (fp16 needs torch.amp.GradScaler beside it.) ConfigError for any
    other word."""
    from treadle.ops import precision as number_formats

    device = pick_device(device)
    if precision != "auto" and precision not in number_formats.DTYPES:
        raise ConfigError(f"precision = {precision!r}: give auto, {', '.join(number_formats.DTYPES)}")
    return number_formats.autocast(number_formats.resolve(precision, device, width), device)
