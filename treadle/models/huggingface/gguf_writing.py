"""A transformer of treadle's as a .gguf file (llama.cpp): the other direction of gguf_file.py, from the same tables."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treadle.errors import ConfigError, InputError, MissingExtra
from treadle.models.base import ModelConfig
from treadle.models.huggingface.config import described
from treadle.models.huggingface.gguf_file import INSIDE, OUTSIDE
from treadle.models.huggingface.gguf_tokens import metadata_of
from treadle.models.huggingface.tables import FAMILIES, Family
from treadle.models.huggingface.writing import for_family
from treadle.models.transformer import TransformerConfig
from treadle.text.base import Tokenizer

TYPES = ("f32", "f16", "q8_0")
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # general.file_type, as llama.cpp numbers what most tensors are
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # family -> llama.cpp's name
WRITTEN_BY = "treadle.version"  # a key of the file; files without it are somebody else's
LARGEST_HALF = 65504.0  # of fp16
BLOCK = 32  # numbers that share a scale in q8_0


def written_for_llama_cpp(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The family that llama.cpp computes as this model, its own first, and the table of its config.json. ConfigError says
    what differs."""
    if not isinstance(config, TransformerConfig):
        raise ConfigError("a .gguf file holds Llama-shaped models, and this is another architecture; use --format treadle")
    problems = []
    for name in sorted(ARCHITECTURES, key=lambda name: name != config.huggingface_family):
        try:
            family, table = FAMILIES[name], described(config, FAMILIES[name])
            _refuse(family, table)
            return family, table
        except ConfigError as problem:
            problems.append(str(problem))
    nearest = min(problems, key=lambda problem: problem.count(" = "))  # the first of equals is of its own family
    raise ConfigError(f"a .gguf file cannot hold this model: {nearest}; use --format huggingface or --format treadle")


def _refuse(family: Family, table: Mapping[str, Any]) -> None:
    """What transformers computes of these families and llama.cpp does not."""
    if table.get("sliding_window") is not None and table.get("use_sliding_window", True):
        raise ConfigError(f"llama.cpp attends in full in a {family.model_type} model (sliding_window = {table['sliding_window']})")
    scaling = table.get("rope_scaling") or {}
    if scaling.get("rope_type", "default") not in ("default", "linear"):
        raise ConfigError(f"rope_scaling of the kind {scaling['rope_type']} is not written; of llama.cpp's, linear alone is")
    if table.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"llama.cpp computes silu in a {family.model_type} model, and this one has {table['hidden_act']}")
    if family.model_type == "qwen3" and table.get("attention_bias"):
        raise ConfigError("llama.cpp has no attention_bias in a qwen3 model")


def write_gguf(
    path: Path, config: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer | None, kind: str,
    template: str | None = None, described_as: Mapping[str, str] | None = None,
) -> Path:  # fmt: skip
    """Writes the file at once or not at all. kind: f32, f16 or q8_0 for matrices (f16 where a row does not divide into blocks
    of 32); vectors stay fp32. template: the chat template's text. described_as: general.* keys (name, license).
    ConfigError: llama.cpp has no such model or tokenizer, or a weight is too large for f16. MissingExtra without the
    package gguf. Weights [N, K]."""
    try:
        import gguf
    except ImportError:
        raise MissingExtra("writing a .gguf file", "hf") from None
    family, table = written_for_llama_cpp(config)
    assert isinstance(config, TransformerConfig)
    tokens = metadata_of(tokenizer, config.vocab_size) if tokenizer is not None else None
    partial = path.with_name(f".tmp-{path.name}")
    writer = gguf.GGUFWriter(partial, ARCHITECTURES[family.model_type])
    try:
        _describe(writer, table, kind, tokens, template, described_as or {})
        numbers = list(_converted(family, config, weights, kind, gguf))
        for name, data, form in numbers:
            writer.add_tensor(name, data, raw_dtype=form)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return path


def _describe(
    writer: Any, table: Mapping[str, Any], kind: str, tokens: Mapping[str, Any] | None, template: str | None, told: Mapping[str, str]
) -> None:
    writer.add_string(WRITTEN_BY, metadata.version("treadle"))
    for key, value in told.items():
        writer.add_string(f"general.{key}", value)
    heads, width = table["num_attention_heads"], table.get("head_dim") or table["hidden_size"] // table["num_attention_heads"]
    writer.add_vocab_size(table["vocab_size"])
    writer.add_context_length(table["max_position_embeddings"])
    writer.add_embedding_length(table["hidden_size"])
    writer.add_block_count(table["num_hidden_layers"])
    writer.add_feed_forward_length(table["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(table.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(table["rope_theta"])
    writer.add_layer_norm_rms_eps(table["rms_norm_eps"])
    if (scaling := table.get("rope_scaling") or {}).get("rope_type") == "linear":
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(scaling["factor"])
    writer.add_file_type(FILE_TYPES[kind])
    if kind == "q8_0":
        writer.add_quantization_version(2)
    if tokens is None:
        writer.add_tokenizer_model("none")  # llama.cpp then takes and gives ids alone
        return
    writer.add_tokenizer_model(tokens["model"])
    writer.add_tokenizer_pre(tokens["pre"])
    writer.add_token_list(tokens["tokens"])
    writer.add_token_types(tokens["token_type"])
    writer.add_token_merges(tokens["merges"])
    writer.add_add_bos_token(tokens["add_bos_token"])
    for key in ("bos_token_id", "eos_token_id", "eot_token_id", "unknown_token_id", "padding_token_id"):
        if key in tokens:
            writer.add_uint32(f"tokenizer.ggml.{key}", tokens[key])
    if template is not None:
        writer.add_chat_template(template)


def _converted(
    family: Family, config: TransformerConfig, weights: Mapping[str, Tensor], kind: str, gguf: Any
) -> Iterator[tuple[str, np.ndarray, Any]]:
    """(llama.cpp's name, numbers, what they are) of every weight."""
    outside, inside = {theirs: ours for ours, theirs in OUTSIDE.items()}, {theirs: ours for ours, theirs in INSIDE.items()}
    heads = {"attn_q": config.num_heads, "attn_k": config.groups} if ARCHITECTURES[family.model_type] == "llama" else {}
    forms = gguf.GGMLQuantizationType
    for name, tensor in for_family(family, config, weights, torch.float32).items():
        stem, _, end = name.rpartition(".")
        if stem in outside:
            called = f"{outside[stem]}.{end}"
        else:
            number, _, inner = stem.removeprefix(family.layers).partition(".")
            called = f"blk.{number}.{inside[inner]}.{end}"
            if count := heads.get(inside[inner]):  # pairs of rotated dimensions side by side, as the llama architecture has them
                tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        data = tensor.detach().contiguous().numpy()
        form = forms.F32 if kind == "f32" or data.ndim == 1 else forms.F16
        if kind == "q8_0" and data.ndim == 2 and data.shape[1] % BLOCK == 0:
            form = forms.Q8_0
        largest = float(np.abs(data).max()) if form == forms.F16 else 0.0
        if largest > LARGEST_HALF:
            raise ConfigError(f"{name} holds a number that fp16 cannot ({largest:.3g}); use --gguf_type f32")
        yield called, gguf.quantize(data, form), form if form == forms.Q8_0 else None


def refuse_foreign_file(path: Path) -> None:
    """InputError unless there is no file, or one that an export wrote."""
    if not path.exists():
        return
    try:
        import gguf

        own = WRITTEN_BY in gguf.GGUFReader(str(path)).fields
    except Exception:  # whatever the package's parsing runs into: not ours
        own = False
    if not own:
        raise InputError(f"{path} exists and was written by another program; give another file with --output")
