"""Changes the model it is given: puts adapters on a frozen base before a run, and loads what a run starts from."""

from __future__ import annotations

from pathlib import Path

import torch

from treadle.checkpoint.reader import Checkpoint
from treadle.errors import ConfigError
from treadle.layers.lora import is_adapter
from treadle.models.adapters import adapted_layers, add_adapters, load_base, read_in_place
from treadle.models.base import Model, count_label
from treadle.models.pretrained import base_of, plain_weights, read_adapters, weights_checksum, whole_weights
from treadle.training.checkpoints import Checkpoints
from treadle.training.config import Recipe


def put_on(model: Model, recipe: Recipe, start: Checkpoint | None, begun: bool) -> Checkpoint | None:
    """Adapters on a model without memory, and the base whose weights they need; None where the recipe asks for none. The
    recipe then names the base. start: what --from named; begun: the run has a base already, which start does not replace.
    ConfigError without a base, and with DeepSpeed."""
    settings = recipe.adapter
    if settings.lora_rank is None:
        return None
    if recipe.parallel.mode == "deepspeed" or recipe.parallel.deepspeed is not None:
        raise ConfigError("adapters are trained without DeepSpeed; use --parallel ddp or --parallel fsdp")
    if begun and settings.base_model is not None:
        base = base_of(settings, f"this run ({recipe.folder})")
    elif start is not None:
        base = start
        settings.base_checksum = weights_checksum(start)
    else:
        raise ConfigError("adapters are trained on a model that is there: add --from RUN (a run, a checkpoint or a folder of "
                          "transformers), or leave --lora_rank out to train a new model whole")  # fmt: skip
    settings.base_model = str(Path(base.folder).resolve())
    add_adapters(model, settings)
    return base


def notes(model: torch.nn.Module) -> list[str]:
    """What the settings ask of adapters and do not get, a line each: dropout where weights are read in place."""
    found = {name: layer.dropout for name, layer in read_in_place(model).items() if layer.dropout > 0}
    if not found:
        return []
    kinds = dict.fromkeys(".".join(name.split(".")[-2:]) for name in found)
    return [f"lora_dropout = {next(iter(found.values())):g} is not applied in {', '.join(kinds)} ({len(found)} of {len(adapted_layers(model))} "
            "adapters), whose weights are read in place; --lora_targets can leave them out"]  # fmt: skip


def load_start(checkpoints: Checkpoints, start: Checkpoint) -> None:
    """All weights of a run start as those of `start`, its adapters merged."""
    if read_adapters(start) is None:
        checkpoints.load_weights(start)
    else:
        checkpoints.assembly.model.load_weights(whole_weights(start))


def load_frozen(model: Model, base: Checkpoint) -> str:
    """The base's weights under the adapters; says what is trained and what that takes. Each process reads all of them."""
    load_base(model, plain_weights(base)[0])
    return trained_share(model)


def trained_share(model: torch.nn.Module) -> str:
    """ "trainable 0.4M of 10.8M (3.7%), ..." of a model with adapters."""
    named = dict(model.named_parameters())
    own, frozen = (sum(p.numel() for n, p in named.items() if is_adapter(n) is ours) for ours in (True, False))
    held = sum(p.numel() * p.element_size() for n, p in named.items() if not is_adapter(n))
    # In fp32: weights, gradients, two moments.
    return (f"trainable {count_label(own)} of {count_label(own + frozen)} ({own / (own + frozen):.1%}): {16 * own / 1e6:.1f} MB with "
            f"gradients and moments, beside {held / 1e6:.1f} MB of frozen weights")  # fmt: skip
