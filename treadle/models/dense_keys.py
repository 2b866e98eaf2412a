"""The keys by which dense families differ: biases, norms, positions, windows and caps. Each is off by default.

The names are those of Hugging Face's configurations where it has one; models/huggingface/ has the tables between them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from treadle.layers.rope import checked_scaling
from treadle.models.decoder import DecoderConfig
from treadle.settings import option


class DenseConfig(DecoderConfig):
    """Shape of a decoder of attention and MLPs, as the dense families have it."""

    style: Literal["llama", "gpt2"] = option("llama")
    """llama: RMSNorm, rotary positions, SwiGLU, no biases; gpt2: LayerNorm, learned positions, GELU, biases."""

    attention_bias: bool | None = option(None)
    """Biases of the query, key and value projections; default: in gpt2 style."""

    attention_out_bias: bool | None = option(None)
    """Bias of the projection after attention; default: as attention_bias."""

    mlp_bias: bool | None = option(None)
    """Biases inside the MLP; default: in gpt2 style."""

    mlp: Literal["swiglu", "relu2"] | None = option(None, aliases=("mlp_type",))
    """The feed-forward half: swiglu (gated, with gated_activation), or relu2, down(relu(up x)^2) (arXiv 2109.08668). Default:
    swiglu in llama style; in gpt2 style activation's, without a gate."""

    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu"] = option(
        "gelu_tanh", aliases=("hidden_act",), spellings={"gelu_new": "gelu_tanh", "swish": "silu"}
    )
    """The MLP's activation in gpt2 style (llama style is SwiGLU); gelu and relu choose that style where none is given, relu2
    is mlp = relu2."""

    gated_activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = option(
        "silu", spellings={"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "swish": "silu"}
    )
    """The activation of llama style's gated MLP: silu is SwiGLU, gelu_tanh the GeGLU of Gemma."""

    qk_norm_over: Literal["head", "projection"] = option("head")
    """What qk_norm normalises: each head by itself, or the whole projection at once (OLMo-2)."""

    pre_norm: bool = option(True)
    """Norm before each half of a block (off: after it, as in the first transformer)."""

    post_norms: bool = option(False)
    """A norm on what each half of a block adds, before it is added (Gemma); with pre_norm off it is the only one (OLMo-2)."""

    partial_rotary_factor: float = option(1.0, gt=0, le=1)
    """Share of each head's dimensions that rotary positions turn; the last ones stay as they are."""

    rope_scaling: dict[str, Any] | None = option(None)
    """How rotary positions stretch beyond the length of training: {rope_type = "linear", factor = 2.0}; also dynamic (beyond
    that length, cached decoding differs from the whole row, as in transformers), llama3 and yarn."""

    rope_local_base_freq: float | None = option(None, gt=0)
    """Base of the rotary frequencies in sliding_attention layers (never scaled); default rope_theta and rope_scaling."""

    sliding_window: int | None = option(None, ge=1)
    """Positions that a query of a sliding_attention layer sees, its own among them."""

    attn_logit_softcapping: float | None = option(None, gt=0)
    """Attention scores s become c tanh(s / c) with this c (Gemma 2; takes the slower masked path)."""

    final_logit_softcapping: float | None = option(None, aliases=("logit_softcap",), gt=0)
    """The head's logits z become c tanh(z / c) with this c."""

    query_pre_attn_scalar: float | None = option(None, gt=0)
    """Attention scores are divided by its square root; default the width of a head."""

    value_embeddings: bool = option(False)
    """Every other block, the last among them, adds a vector of each token's own to its attention's values, through a gate
    that a head learns: vocab_size x (num_kv_heads x head_dim) more weights a block, and no more matrix products. A block whose
    layer_types is no attention has none."""

    token_shift: bool = option(False, aliases=("smear",))
    """Each token's embedding takes a share of the one before it in its document, through a gate that reads the token's own: 32
    weights, and two positions are seen before the first attention."""

    zero_init_residual: bool = option(False)
    """Projections into the residual stream start at zero, so that a fresh block adds nothing."""

    mup_base_width: int | None = option(None, aliases=("mup_base_hidden_size",), ge=1)
    """muP (arXiv 2203.03466): the hidden_size at which a learning rate was found, so that it holds at this one. The blocks'
    matrices then start at initializer_range x sqrt(base / hidden_size), the optimiser scales their updates, and logits are
    multiplied by base / hidden_size. Keep head_dim as it was, and initializer_range with it."""

    embedding_multiplier: float = option(1.0, gt=0)
    """The embedding is multiplied by this before the first block."""

    huggingface_family: str | None = option(None)
    """The Hugging Face model_type that an export writes where several could hold the model; set by loading one."""

    @field_validator("rope_scaling")
    @classmethod
    def _scaling_is_known(cls, table: dict[str, Any] | None) -> dict[str, Any] | None:
        return checked_scaling(table) if table is not None else None

    @model_validator(mode="after")
    def _positions_fit(self) -> DenseConfig:
        if self.rotary and (self.rotary_width < 2 or self.rotary_width % 2):
            raise ValueError(f"partial_rotary_factor = {self.partial_rotary_factor} turns {self.rotary_width} of "
                             f"{self.width_of_head} dimensions; it has to be an even number from 2 on")  # fmt: skip
        if self.rope_scaling is not None and self.rope_scaling["rope_type"] == "dynamic" and self.rotary_width < 4:
            raise ValueError("rope_type dynamic needs at least 4 rotary dimensions; give another rope_scaling or a wider head_dim")
        return self

    @property
    def rotary(self) -> bool:
        return self.style == "llama"

    @property
    def rotary_width(self) -> int:
        """Dimensions of a head that positions turn."""
        return int(self.width_of_head * self.partial_rotary_factor)

    @property
    def attention_biases(self) -> tuple[bool, bool]:
        """Of the query, key and value projections; of the one after attention."""
        first = self.style == "gpt2" if self.attention_bias is None else self.attention_bias
        return first, first if self.attention_out_bias is None else self.attention_out_bias

    @property
    def mlp_biases(self) -> bool:
        """Whether the MLPs have biases: mlp_bias, else what the style has."""
        return self.style == "gpt2" if self.mlp_bias is None else self.mlp_bias

    @property
    def width_ratio(self) -> float:
        """muP's base width over this one; 1 without it."""
        return 1.0 if self.mup_base_width is None else self.mup_base_width / self.hidden_size

    @property
    def gated(self) -> bool:
        """The MLP multiplies by a gate (SwiGLU and its kind)."""
        return self.mlp == "swiglu" or (self.mlp is None and self.style == "llama")

    @property
    def mlp_activation(self) -> str:
        """Of the MLP, gated or not, as layers/mlp.py ACTIVATIONS calls it."""
        return self.mlp if self.mlp == "relu2" else self.gated_activation if self.gated else self.activation

    def has_value_embedding(self, layer: int) -> bool:
        """Whether this block has vectors of the tokens where its mixer is attention: every other one, counted from the last."""
        return self.value_embeddings and (self.num_layers - 1 - layer) % 2 == 0

    @property
    def ends_normalised(self) -> bool:
        """A norm stands before the head; blocks that normalise their sums need none."""
        return self.pre_norm or self.post_norms

    @property
    def inner(self) -> int:
        if not self.gated:
            return self.intermediate_size or 4 * self.hidden_size
        return super().inner
