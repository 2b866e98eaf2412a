"""One table a family: which of its configuration's keys is which of ours, and which of its weights.

A table serves both directions. What a config.json says is either translated (`keys` and the few rules of config.py), has one
value that is computed (`only`), or changes nothing that a model computes (WITHOUT_EFFECT); anything else is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Weight:
    """One tensor of theirs, without its .weight or .bias: the rows of `ours` one after the other. transposed: it holds the
    transpose of a matrix (Conv1D); offset: what is added to get ours (Gemma's norms multiply by 1 + weight)."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class Family:
    """What config.json and the weights of one model_type mean."""

    model_type: str
    architecture: str  # the class that transformers builds
    keys: dict[str, str]  # their key -> ours, of the same value
    defaults: dict[str, Any]  # of their keys where config.json leaves one out, as their class has them
    always: dict[str, Any]  # our keys in every model of the family
    weights: tuple[Weight, ...]  # outside the layers
    layer: tuple[Weight, ...]  # inside a layer
    prefix: str = "model."  # of the weights in the base model's files, which some leave out
    layers: str = "model.layers."  # of the weights of layer 0, before "0."
    only: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # their keys whose other values are not computed
    activation: str = "hidden_act"  # their key for it
    windows: Literal["none", "every", "after", "pattern"] = "none"  # how sliding windows are spread over the layers
    pattern: int = 0  # with windows = "pattern": every such layer attends in full
    rope_types: tuple[str, ...] = ("linear", "dynamic", "llama3", "yarn")
    partial_rotary: bool = False
    local_theta: float | None = None  # their default base of the rotary frequencies in sliding layers
    scaled_embedding: bool = False  # the embedding is multiplied by sqrt(hidden_size)


# What transformers writes into every config.json, what belongs to generation, tokenizers or heads of other tasks, and what
# other tools leave there: none of it changes a logit.
WITHOUT_EFFECT = frozenset(
    """architectures model_type dtype torch_dtype transformers_version _name_or_path name_or_path _commit_hash
    use_cache bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix
    output_attentions output_hidden_states return_dict return_dict_in_generate output_scores use_return_dict torchscript
    id2label label2id num_labels problem_type finetuning_task task_specific_params is_decoder use_bfloat16
    attn_implementation _attn_implementation _attn_implementation_internal _attn_implementation_autoset use_flash_attn
    gradient_checkpointing do_sample max_length min_length temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_beams num_beam_groups diversity_penalty
    early_stopping num_return_sequences bad_words_ids begin_suppress_tokens suppress_tokens forced_bos_token_id
    forced_eos_token_id exponential_decay_length_penalty remove_invalid_values
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout n_ctx
    cache_implementation transformers.js_config unsloth_fixed unsloth_version""".split()
)
# Of every family, with the values that are computed.
ONLY: dict[str, tuple[Any, ...]] = {
    "chunk_size_feed_forward": (0,), "is_encoder_decoder": (False,), "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,), "tie_encoder_decoder": (False,), "pruned_heads": ({}, None),
    "use_bidirectional_attention": (False, None),
}  # fmt: skip

SHAPE = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "intermediate_size": "intermediate_size",
    "rms_norm_eps": "norm_eps", "tie_word_embeddings": "tie_embeddings",
    "max_position_embeddings": "max_position_embeddings", "initializer_range": "initializer_range",
    "attention_dropout": "attention_dropout", "head_dim": "head_dim",
}  # fmt: skip
BIAS = {"attention_bias": "attention_bias"}
USUAL = {
    "num_key_value_heads": None, "tie_word_embeddings": False, "max_position_embeddings": 2048, "initializer_range": 0.02,
    "rms_norm_eps": 1e-6, "attention_dropout": 0.0, "head_dim": None, "hidden_act": "silu", "rope_theta": 10000.0,
}  # fmt: skip
LLAMA_STYLE = {"style": "llama", "pre_norm": True}


def _renamed(offset: float = 0.0, **stems: str) -> tuple[Weight, ...]:
    """Tensors that only have another name; __ stands for a dot."""
    return tuple(Weight(theirs.replace("__", "."), (ours.replace("__", "."),), offset=offset) for theirs, ours in stems.items())


def _outside(offset: float = 0.0) -> tuple[Weight, ...]:
    return (*_renamed(model__embed_tokens="embedding", lm_head="head"), *_renamed(offset, model__norm="norm"))


ATTENTION = _renamed(self_attn__q_proj="attention.query", self_attn__k_proj="attention.key", self_attn__v_proj="attention.value",
                     self_attn__o_proj="attention.out")  # fmt: skip
GATED = _renamed(mlp__gate_proj="mlp.gate", mlp__up_proj="mlp.up", mlp__down_proj="mlp.down")
PRE_NORMS = _renamed(input_layernorm="attention_norm", post_attention_layernorm="mlp_norm")
QK_NORMS = _renamed(self_attn__q_norm="attention.query_norm", self_attn__k_norm="attention.key_norm")
GEMMA_QK_NORMS = _renamed(1.0, self_attn__q_norm="attention.query_norm", self_attn__k_norm="attention.key_norm")
GEMMA_NORMS = _renamed(1.0, input_layernorm="attention_norm", post_attention_layernorm="attention_post_norm",
                       pre_feedforward_layernorm="mlp_norm", post_feedforward_layernorm="mlp_post_norm")  # fmt: skip

LLAMA = Family(
    "llama", "LlamaForCausalLM",
    keys={**SHAPE, **BIAS, "mlp_bias": "mlp_bias"},
    defaults={**USUAL, "attention_bias": False, "mlp_bias": False},
    always=LLAMA_STYLE, weights=_outside(), layer=(*ATTENTION, *GATED, *PRE_NORMS),
    only={"pretraining_tp": (1,)},
)  # fmt: skip

MISTRAL = Family(
    "mistral", "MistralForCausalLM",
    keys=SHAPE,
    defaults={**USUAL, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    always=LLAMA_STYLE, weights=_outside(), layer=(*ATTENTION, *GATED, *PRE_NORMS), windows="every",
)  # fmt: skip

QWEN_DEFAULTS = {**USUAL, "num_key_value_heads": 32, "max_position_embeddings": 32768, "use_sliding_window": False,
                 "sliding_window": 4096, "max_window_layers": 28}  # fmt: skip
QWEN2 = Family(
    "qwen2", "Qwen2ForCausalLM",
    keys=SHAPE, defaults=QWEN_DEFAULTS,
    always={**LLAMA_STYLE, "attention_bias": True, "attention_out_bias": False},
    weights=_outside(), layer=(*ATTENTION, *GATED, *PRE_NORMS), windows="after",
    only={"use_mrope": (False,), "mrope_section": (None,)},
)  # fmt: skip

QWEN3 = Family(
    "qwen3", "Qwen3ForCausalLM",
    keys={**SHAPE, **BIAS}, defaults={**QWEN_DEFAULTS, "head_dim": 128, "attention_bias": False},
    always={**LLAMA_STYLE, "qk_norm": True},
    weights=_outside(), layer=(*ATTENTION, *GATED, *PRE_NORMS, *QK_NORMS), windows="after",
)  # fmt: skip

OLMO2 = Family(
    "olmo2", "Olmo2ForCausalLM",
    keys={**SHAPE, **BIAS}, defaults={**USUAL, "rms_norm_eps": 1e-5, "attention_bias": False},
    always={"style": "llama", "pre_norm": False, "post_norms": True, "qk_norm": True, "qk_norm_over": "projection"},
    weights=_outside(),
    layer=(*ATTENTION, *GATED, *_renamed(post_attention_layernorm="attention_post_norm", post_feedforward_layernorm="mlp_post_norm"),
           *QK_NORMS),
)  # fmt: skip

GEMMA_KEYS = {**SHAPE, **BIAS, "final_logit_softcapping": "final_logit_softcapping",
              "query_pre_attn_scalar": "query_pre_attn_scalar"}  # fmt: skip
GEMMA_DEFAULTS = {**USUAL, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
                  "attention_bias": False, "query_pre_attn_scalar": 256, "sliding_window": 4096}  # fmt: skip
GEMMA2 = Family(
    "gemma2", "Gemma2ForCausalLM",
    keys={**GEMMA_KEYS, "attn_logit_softcapping": "attn_logit_softcapping"},
    defaults={**GEMMA_DEFAULTS, "max_position_embeddings": 8192, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    always={**LLAMA_STYLE, "post_norms": True},
    weights=_outside(1.0), layer=(*ATTENTION, *GATED, *GEMMA_NORMS),
    activation="hidden_activation", windows="pattern", pattern=2, scaled_embedding=True,
)  # fmt: skip

GEMMA3 = Family(
    "gemma3_text", "Gemma3ForCausalLM",
    keys=GEMMA_KEYS,
    defaults={**GEMMA_DEFAULTS, "max_position_embeddings": 131072, "final_logit_softcapping": None, "rope_theta": 1e6},
    always={**LLAMA_STYLE, "post_norms": True, "qk_norm": True},
    weights=_outside(1.0), layer=(*ATTENTION, *GATED, *GEMMA_NORMS, *GEMMA_QK_NORMS),
    only={"attn_logit_softcapping": (None,)},
    activation="hidden_activation", windows="pattern", pattern=6, local_theta=10000.0, scaled_embedding=True,
)  # fmt: skip

PHI3 = Family(
    "phi3", "Phi3ForCausalLM",
    keys=SHAPE, defaults={**USUAL, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None},
    always=LLAMA_STYLE, weights=_outside(),
    layer=(Weight("self_attn.qkv_proj", ("attention.query", "attention.key", "attention.value")), *ATTENTION[3:],
           Weight("mlp.gate_up_proj", ("mlp.gate", "mlp.up")), *GATED[2:], *PRE_NORMS),
    # original_max_position_embeddings belongs to rope_type longrope, which is refused; the embedding's dropout is never applied.
    only={"resid_pdrop": (0, 0.0), "attention_bias": (False,)},
    windows="every", rope_types=("linear", "dynamic"), partial_rotary=True,
)  # fmt: skip

GPT2 = Family(
    "gpt2", "GPT2LMHeadModel",
    keys={"vocab_size": "vocab_size", "n_positions": "max_position_embeddings", "n_embd": "hidden_size", "n_layer": "num_layers",
          "n_head": "num_heads", "n_inner": "intermediate_size", "resid_pdrop": "dropout", "attn_pdrop": "attention_dropout",
          "layer_norm_epsilon": "norm_eps", "initializer_range": "initializer_range", "tie_word_embeddings": "tie_embeddings"},
    defaults={"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
              "activation_function": "gelu_new", "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
              "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": True},
    always={"style": "gpt2", "pre_norm": True},
    weights=_renamed(transformer__wte="embedding", transformer__wpe="positions", transformer__ln_f="norm", lm_head="head"),
    layer=(*_renamed(ln_1="attention_norm", ln_2="mlp_norm"),
           Weight("attn.c_attn", ("attention.query", "attention.key", "attention.value"), transposed=True),
           Weight("attn.c_proj", ("attention.out",), transposed=True), Weight("mlp.c_fc", ("mlp.up",), transposed=True),
           Weight("mlp.c_proj", ("mlp.down",), transposed=True)),
    prefix="transformer.", layers="transformer.h.",
    only={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "reorder_and_upcast_attn": (False, True)},
    activation="activation_function",
)  # fmt: skip

# In the order in which an export tries them where the model says nothing itself.
FAMILIES = {f.model_type: f for f in (LLAMA, GPT2, MISTRAL, QWEN2, QWEN3, OLMO2, GEMMA2, GEMMA3, PHI3)}
# Tensors that files of some versions hold beside the weights: constants that are computed.
CONSTANTS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
