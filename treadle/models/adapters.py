"""Adapters on a model: which layers they go on, switched off, merged, and their names in files."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from treadle.errors import ConfigError
from treadle.layers.bitlinear import BitLinear
from treadle.layers.lora import LORA_A, LORA_B, PLAIN, AdaptedLinear, FrozenLinear, is_adapter, widened
from treadle.models.base import Model, ModelConfig
from treadle.models.settings import ALL_LINEAR, AdapterSettings
from treadle.ops.packed_linear import quantize
from treadle.ops.sharding import copy_whole
from treadle.registry import nearest

# What transformers calls the layers of most of its models.
THEIR_NAMES = {
    "q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value", "o_proj": "attention.out",
    "gate_proj": "mlp.gate", "up_proj": "mlp.up", "down_proj": "mlp.down",
}  # fmt: skip


def alpha_of(settings: AdapterSettings) -> float:
    """lora_alpha, or twice the rank where none is given."""
    return settings.lora_alpha if settings.lora_alpha is not None else 2.0 * (settings.lora_rank or 1)


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r)."""
    return alpha / (rank**0.5 if rslora else rank)


def _scale(settings: AdapterSettings) -> float:
    return scale_of(alpha_of(settings), settings.lora_rank or 1, settings.use_rslora)


def add_adapters(model: Model, settings: AdapterSettings, seed: int = 0) -> None:
    """Puts adapters on the model in place and freezes everything else. Their values come from (seed, name), of a model without
    memory when it is materialised. ConfigError where nothing can be adapted, or a name fits nothing."""
    if settings.lora_rank is None:
        raise ConfigError("adapters need a rank: --lora_rank 8")
    if model.adapted:
        raise ConfigError("the model has adapters already; merge them first (treadle.models.adapters.merge)")
    chosen = set(targets(model, settings.lora_targets))
    model.requires_grad_(False)
    for name, layer in adaptable(model).items():
        if name in chosen:
            AdaptedLinear.take(layer, settings.base_precision)
            assert isinstance(layer, AdaptedLinear)
            layer.adapt(settings.lora_rank, _scale(settings), settings.lora_dropout)
        else:
            FrozenLinear.take(layer, settings.base_precision)
    model.adapted = True
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name) and not parameter.is_meta:
                parameter.copy_(model._initial_values(seed, name, parameter))


def made(cls: type[Model], config: ModelConfig, settings: AdapterSettings | None) -> Model:
    """A model of a configuration, under adapters where there are settings of some."""
    model = cls(config)
    if settings is not None:
        add_adapters(model, settings)
    return model


def adaptable(model: Model) -> dict[str, nn.Linear]:
    """Name -> each layer that computes x W^T + b alone, but for the heads."""
    heads = {id(part) for head in model.heads().values() for part in head.modules()}
    return {name: layer for name, layer in model.named_modules() if type(layer) in PLAIN and id(layer) not in heads}


def targets(model: Model, patterns: list[str]) -> list[str]:
    """The names of the layers that the patterns mean, in the model's order. ConfigError for a model that takes none,
    and for a pattern that fits no layer."""
    layers = list(adaptable(model))
    ternary = [name for name, layer in model.named_modules() if isinstance(layer, BitLinear)]
    if not layers:
        reason = ("its linear layers are ternary, and what is added to a ternary weight is rounded away with it. Train it whole (leave "
                  "--lora_rank out), or adapt a model with ternary = false" if ternary else "it has no linear layers but its head")  # fmt: skip
        raise ConfigError(f"the model {model.arch} takes no adapters: {reason}")
    found: set[str] = set()
    for pattern in patterns:
        fitting = layers if pattern == ALL_LINEAR else [name for name in layers if fits(name, pattern)]
        if not fitting:
            raise ConfigError(_no_such(model, pattern, layers, ternary))
        found.update(fitting)
    return [name for name in layers if name in found]


def fits(name: str, pattern: str) -> bool:
    """Whether a layer is meant by its name, the end of it, or a pattern with * in it."""
    wanted = THEIR_NAMES.get(pattern.rpartition(".")[2], pattern)
    return name == wanted or name.endswith("." + wanted) or fnmatch.fnmatchcase(name, wanted)


def _no_such(model: Model, pattern: str, layers: list[str], ternary: list[str]) -> str:
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    if any(fits(name, pattern) for name in ternary):
        return (f"lora_targets: {pattern!r} is a ternary layer, and what is added to a ternary weight is rounded away with it; these "
                f"can be adapted: {', '.join(ends)}")  # fmt: skip
    if any(fits(name, pattern) for name in model.heads()) or pattern in ("head", "lm_head"):
        return f"lora_targets: the head {pattern!r} is not adapted; these can be: {', '.join(ends)}"
    return f"lora_targets: no linear layer of {model.arch} is called {pattern!r}: {nearest(pattern, [ALL_LINEAR, *ends])}"


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Module name -> layer, of all that have an adapter."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, AdaptedLinear)}


def read_in_place(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Module name -> layer, of those with an adapter whose weights are read instead of calling them: right, but without dropout."""
    return {
        name: layer for name, layer in adapted_layers(model).items()
        if name.rpartition(".")[2] in getattr(model.get_submodule(name.rpartition(".")[0]), "read_in_place", ())
    }  # fmt: skip


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as its base does."""
    layers = [layer for layer in adapted_layers(model).values() if not layer.off]
    for layer in layers:
        layer.off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.off = False


@torch.no_grad()
def merge(model: Model) -> None:
    """The adapters become part of the weights, in place: plain layers again, in fp32, that are trained as any."""
    for layer in [m for m in model.modules() if isinstance(m, FrozenLinear)]:
        weight = layer.weight.detach().clone()
        for name in (LORA_A, LORA_B):
            layer._parameters.pop(name, None)
        layer._buffers.pop("scales", None)
        layer.__class__ = PLAIN[1] if layer.reproducible else PLAIN[0]  # type: ignore[assignment]
        layer._parameters["weight"] = nn.Parameter(weight)
    model.requires_grad_(True)
    model.adapted = False
    model.tie()


@torch.no_grad()
def merged(base: dict[str, Tensor], trained: dict[str, Tensor], settings: AdapterSettings, frozen: list[str]) -> dict[str, Tensor]:
    """The weights of base and adapters together, by the base's names. frozen: the layers whose weights were held in
    base_precision. Weights [N, K], lora_A [r, K], lora_B [N, r]."""
    whole = dict(base)
    for name in frozen if settings.base_precision != "fp32" else []:
        held = quantize(whole[f"{name}.weight"], settings.base_precision)
        whole[f"{name}.weight"] = widened(held.codes, held.scales, torch.float32)
    for name in [n.removesuffix("." + LORA_A) for n in trained if n.endswith("." + LORA_A)]:
        a, b = trained[f"{name}.{LORA_A}"], trained[f"{name}.{LORA_B}"]
        whole[f"{name}.weight"] = whole[f"{name}.weight"].float() + _scale(settings) * (b @ a)
    return {**whole, **{n: t for n, t in trained.items() if not is_adapter(n)}}


@torch.no_grad()
def load_base(model: Model, tensors: dict[str, Tensor]) -> None:
    """Copies the base's weights under the adapters; each is dropped from `tensors` once it is there. ShapeError for a
    model of other weights. Of any shapes."""
    wanted = {n: t for n, t in model.named_weights().items() if not is_adapter(n)}
    model.refuse_other_weights({name: list(tensor.shape) for name, tensor in tensors.items()}, wanted)
    for name, target in wanted.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, FrozenLinear) and name.endswith(".weight"):
            layer.hold(tensors.pop(name))
        else:
            copy_whole(target, tensors.pop(name))
