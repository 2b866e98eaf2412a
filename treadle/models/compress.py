"""A trained model with a smaller decoding cache: attention's keys and values become functions of r numbers a token."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.generation.mode import evaluating
from treadle.models.base import Model
from treadle.models.shc import SHC

SMALLEST = 1e-6  # of the largest eigenvalue; directions that the text never takes


@torch.no_grad()
def compress_cache(model: Model, batches: Iterable[Batch], latent_size: int) -> SHC:
    """A copy of a multi-stream transformer that caches `latent_size` numbers a token instead of 2 G E (keys and values).

    The best rank-r approximation of [W_k; W_v] for the inputs seen in `batches`: the singular value decomposition of
    [W_k; W_v] C^1/2, C the inputs' second moment. Train it on for a while afterwards (`treadle.Trainer`). ConfigError for
    other models.
    """
    if type(model) is not SHC or model.config.latent_size is not None:
        raise ConfigError("only a multi-stream transformer (shc) with a whole cache can be compressed")
    mixers = model.token_mixers()
    moments = [torch.zeros(model.config.hidden_size, model.config.hidden_size, dtype=torch.float64) for _ in mixers]
    seen: list[list[Tensor]] = [[] for _ in mixers]
    handles = [
        mixer.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0])) for mixer, kept in zip(mixers, seen)
    ]
    try:
        with evaluating(model) as was_training:
            for batch in batches:
                model.hidden(batch.to(model.device))
                for moment, kept in zip(moments, seen):
                    x = kept.pop()[batch.token_mask.to(model.device)].double().cpu()
                    moment += x.T @ x
    finally:
        for handle in handles:
            handle.remove()
    with torch.device("meta"):
        made = SHC(model.config.model_copy(update={"latent_size": latent_size}))
    made.start_from(model.named_weights())
    made.materialise(0, model.device)
    for old, new, moment in zip(mixers, made.token_mixers(), moments):
        _factor(old, new, moment, latent_size)
    return made.train(was_training)


def _factor(old: torch.nn.Module, new: torch.nn.Module, moment: Tensor, size: int) -> None:
    key, value = old.get_parameter("key.weight"), old.get_parameter("value.weight")
    both = torch.cat([key, value]).double().cpu()
    values, vectors = torch.linalg.eigh(moment)
    root = values.clamp_min(SMALLEST * float(values[-1])).sqrt()
    u, s, v = torch.linalg.svd(both @ (vectors * root), full_matrices=False)
    # Both factors carry half of each singular value, at the scale of a weight: training goes on from here.
    half = (s[:size] / s[0]).sqrt()
    down, up = half[:, None] * (v[:size] @ (vectors / root).T), u[:, :size] * half * s[0]
    balance = (down.norm() / up.norm()).sqrt()
    down, up = down / balance, up * balance
    rows = len(key)
    for name, part in (("down", down), ("key", up[:rows]), ("value", up[rows:])):
        target = new.get_parameter(f"{name}.weight")
        target.zero_()  # there may be fewer singular values than `size`
        target[: part.shape[0], : part.shape[1]] = part.to(target)
