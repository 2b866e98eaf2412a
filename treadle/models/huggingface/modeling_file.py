"""A model as transformers loads it with trust_remote_code: config.json and one modeling file that needs torch and transformers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from treadle import trusted_code
from treadle.errors import ConfigError
from treadle.layers.token_mixers import TOKEN_MIXERS, layer_types_of
from treadle.models.base import LM_HEAD, Model, ModelConfig
from treadle.models.huggingface.bundled_source import Place
from treadle.models.huggingface.bundling import PORTABLE, Bundle
from treadle.models.huggingface.reading import OWN_KEYS, PREFIX
from treadle.models.huggingface.writing import NAMES_OF_DTYPES
from treadle.models.transformer import TransformerConfig
from treadle.version import __version__

CAUSAL_LM = "treadle.models.huggingface.causal_lm"
ROOTS = [Place(CAUSAL_LM, name) for name in ("TreadleConfig", "TreadleCache", "TreadleForCausalLM")]
MIXERS = Place("treadle.layers.token_mixers", "TOKEN_MIXERS")

HEADER = '''"""{arch} as transformers loads it: AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True).

Written by treadle {version} (Apache License 2.0) out of its own source, whose files the headings name, without kernels and without
what training needs. It takes torch and transformers alone, and computes what treadle does. Do not edit: an export writes it anew.
"""
'''


def name_of(cls: type[Model]) -> str:
    """The module that the file becomes, without .py."""
    return f"modeling_treadle_{cls.arch}".lower().replace("-", "_")


def with_code(
    cls: type[Model], shape: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype, tokens: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, bytes]]:  # fmt: skip
    """(table of config.json, weights by transformers' names in `dtype`, the modeling file by its name). tokens: bos_token_id and its
    like. ConfigError for a model that predicts no tokens one after the other. Weights of any shapes."""
    table = {**described(cls, shape), **tokens, "dtype": NAMES_OF_DTYPES[dtype], "torch_dtype": NAMES_OF_DTYPES[dtype]}
    named = {f"{PREFIX}{name}": tensor.to(dtype).contiguous() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    return table, named, {f"{name_of(cls)}.py": modeling_file(cls, shape).encode()}


def described(cls: type[Model], shape: ModelConfig) -> dict[str, Any]:
    """The table of config.json, but for tokens and the number format. ConfigError as `with_code`."""
    with torch.device("meta"):
        model = cls(shape)
    if reason := _reason_against(model, shape):
        raise ConfigError("transformers would load it as a model that continues a text, token by token from nothing else, and "
                          f"{cls.arch} is none: {reason}; use --format treadle")  # fmt: skip
    file = trusted_code.place_of(cls)  # of a class of somebody's own; its folder is nobody's business
    own = {"arch": cls.arch if file is None else re.split(r"[\\/]", file)[-1], **shape.model_dump()}
    if types := _layer_types(shape):
        own["layer_types"] = types
    embedding = getattr(model, "embedding", None)
    places = {"AutoConfig": f"{name_of(cls)}.TreadleConfig", "AutoModelForCausalLM": f"{name_of(cls)}.TreadleForCausalLM"}
    table = {
        "architectures": ["TreadleForCausalLM"], "auto_map": places, "model_type": f"treadle_{cls.arch}", "vocab_size": model.vocab_size,
        "tie_word_embeddings": embedding is not None and model.head.weight is embedding.weight, OWN_KEYS: own,
    }  # fmt: skip
    if (longest := getattr(shape, "max_position_embeddings", None) or model.longest_row) is not None:
        table["max_position_embeddings"] = longest
    return table


def _reason_against(model: Model, shape: ModelConfig) -> str | None:
    """Why a model does not continue a text from its tokens alone; None where it does."""
    if LM_HEAD not in model.heads():
        return f"it has no head called {LM_HEAD}"
    if extras := type(model).example(shape).extras:
        return f"it reads {', '.join(sorted(extras))} beside its tokens"
    if not model.capabilities.causal:
        return "it is not causal (Capabilities(causal=False))"
    if not model.capabilities.decodes or type(model).new_state is Model.new_state:
        return "it has no new_state" + ("" if model.capabilities.decodes else " (Capabilities(decodes=False))")
    return None


def modeling_file(cls: type[Model], shape: ModelConfig) -> str:
    """The text of the modeling file of a class; of token mixers it holds those that this configuration names."""
    bundle = Bundle(ROOTS, {Place(CAUSAL_LM, "Architecture"): Place(cls.__module__, cls.__name__)}, [CAUSAL_LM], {MIXERS: _mixers(shape)})
    return HEADER.format(arch=cls.arch, version=__version__) + bundle.text()


def _layer_types(shape: ModelConfig) -> list[str]:
    """The name of each block's token mixer, for models that name them."""
    return layer_types_of(shape.layer_types, shape.num_layers) if isinstance(shape, TransformerConfig) else []


def _mixers(shape: ModelConfig) -> tuple[str, list[Place]]:
    """The table of the mixers that blocks have, and what it names."""
    classes = {name: TOKEN_MIXERS.get(name) for name in sorted(set(_layer_types(shape)))}
    text = ", ".join(f'"{name}": {found.__name__}' for name, found in classes.items())
    return f"MixerTable({{{text}}})", [Place(PORTABLE, "MixerTable"), *(Place(one.__module__, one.__name__) for one in classes.values())]
