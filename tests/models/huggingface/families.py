"""Small models of each family, made and written by transformers, with its awkward features on."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as T

VOCABULARY = 61
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 500.0, **({"factor": 4.0} if kind != "default" else {}), **more}


ORIGINAL = {"original_max_position_embeddings": 16}
GEMMA: dict[str, Any] = {**SHAPE, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5, "final_logit_softcapping": 3.0}
# Rows of the tests have 40 tokens: beyond each sliding window, and beyond 16, the length that scaled positions begin from.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SHAPE, "head_dim": 16, "attention_bias": True, "mlp_bias": True, "rope_parameters": rope(
        "llama3", low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL)}),
    "smollm": ("Llama", {**SHAPE, "tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 36}),
    "llama_linear": ("Llama", {**SHAPE, "rope_parameters": rope("linear")}),
    "llama_dynamic": ("Llama", {**SHAPE, "max_position_embeddings": 16, "rope_parameters": rope("dynamic")}),
    "llama_yarn": ("Llama", {**SHAPE, "rope_parameters": rope("yarn", **ORIGINAL)}),
    "llama_yarn_mscale": ("Llama", {**SHAPE, "rope_parameters": rope("yarn", beta_fast=8, beta_slow=2, mscale=1.5, mscale_all_dim=0.5,
                                                                     truncate=False, **ORIGINAL)}),
    "mistral": ("Mistral", {**SHAPE, "head_dim": 16, "sliding_window": 7}),
    "mistral_full": ("Mistral", {**SHAPE, "sliding_window": None, "hidden_act": "gelu"}),
    "qwen2": ("Qwen2", {**SHAPE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**SHAPE, "head_dim": 16, "attention_bias": True}),
    "olmo2": ("Olmo2", {**SHAPE, "attention_bias": True}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3Text", {**GEMMA, "sliding_window_pattern": 2, "rope_parameters": {
        "full_attention": rope("linear"), "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}}),
    "phi3": ("Phi3", {**SHAPE, "sliding_window": 6, "rope_parameters": rope("default", partial_rotary_factor=0.5)}),
    "gpt2": ("GPT2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt2_untied": ("GPT2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 40, "n_positions": 64,
                             "tie_word_embeddings": False, "activation_function": "relu", "bos_token_id": 1, "eos_token_id": 2}),
}  # fmt: skip


def their_model(name: str, seed: int = 0) -> Any:
    """A random model in evaluation mode, its biases and norms random too."""
    torch.manual_seed(seed)
    kind, keys = CASES[name]
    model = T.AutoModelForCausalLM.from_config(getattr(T, f"{kind}Config")(**keys), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


@functools.cache
def written(name: str) -> tuple[Any, Path]:
    """The model, and the folder that transformers wrote it into; tests change neither."""
    model = their_model(name)
    folder = Path(tempfile.mkdtemp(prefix="treadle-families-")) / name
    model.save_pretrained(folder)
    return model, folder


def ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def their_logits(model: Any, rows: torch.Tensor) -> torch.Tensor:
    return model(rows).logits.float()
