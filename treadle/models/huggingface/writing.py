"""A model of treadle's as transformers reads it: its configuration and the names and forms of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from treadle.models.huggingface.config import written
from treadle.models.huggingface.tables import Family, Weight
from treadle.models.transformer import TransformerConfig

TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")  # in config.json and in generation_config.json
NAMES_OF_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def for_transformers(
    config: TransformerConfig, weights: Mapping[str, Tensor], dtype: torch.dtype, tokens: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(table of config.json, weights by transformers' names, in `dtype`). tokens: bos_token_id and its like. ConfigError
    says what no family can hold. Weights [N, K]."""
    family, table = written(config)
    table = {**table, **tokens, "dtype": NAMES_OF_DTYPES[dtype], "torch_dtype": NAMES_OF_DTYPES[dtype]}
    return table, for_family(family, config, weights, dtype)


def for_family(family: Family, config: TransformerConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights by the names and in the forms of one family, in `dtype`. Weights [N, K]."""
    return {name: tensor.to(dtype).contiguous() for name, tensor in _renamed(family, config, weights)}


def _renamed(family: Family, config: TransformerConfig, weights: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    found = []
    places = [("", "", weight) for weight in family.weights]
    places += [(f"{family.layers}{i}.", f"layers.{i}.", weight) for i in range(config.num_layers) for weight in family.layer]
    for theirs, ours, weight in places:
        for kind in ("weight", "bias"):
            names = [f"{ours}{one}.{kind}" for one in weight.ours]
            if all(name in weights for name in names):
                found.append((f"{theirs}{weight.theirs}.{kind}", _joined([weights[name] for name in names], weight)))
    return found


def _joined(parts: list[Tensor], weight: Weight) -> Tensor:
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    if weight.offset:
        whole = whole.float() - weight.offset
    return whole.t() if weight.transposed and whole.dim() == 2 else whole
