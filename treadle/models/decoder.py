"""The keys that all models of attention-like blocks share: width, depth, heads, MLP."""

from __future__ import annotations

from pydantic import model_validator

from treadle.models.base import LanguageModelConfig
from treadle.settings import option


class DecoderConfig(LanguageModelConfig):
    """Shape of a decoder of blocks with a mixer of heads and an MLP."""

    hidden_size: int = option(192, aliases=("d_model", "n_embd", "dim"), ge=1)
    """Width D of the residual stream."""

    num_layers: int = option(4, aliases=("n_layers", "n_layer", "num_hidden_layers", "layers"), ge=1, le=4096)
    """Number of blocks."""

    num_heads: int = option(4, aliases=("n_heads", "n_head", "nhead", "num_attention_heads", "heads"), ge=1)
    """Query heads; hidden_size must divide by it unless head_dim is given."""

    num_kv_heads: int | None = option(None, aliases=("n_kv_heads", "num_key_value_heads"), ge=1)
    """Key and value heads (grouped queries); default num_heads."""

    head_dim: int | None = option(None, ge=2)
    """Width of a head; default hidden_size / num_heads."""

    intermediate_size: int | None = option(None, aliases=("d_ff", "ffn_size", "n_inner"), ge=1)
    """Width inside the MLP; default 8/3 D rounded up to a multiple of 64 (SwiGLU), 4 D (gpt2 style)."""

    tie_embeddings: bool = option(True, aliases=("tie_word_embeddings",))
    """The head shares the embedding's weights."""

    qk_norm: bool = option(False)
    """RMSNorm on queries and keys before the rotation."""

    rope_theta: float = option(10000.0, gt=0)
    """Base of the rotary frequencies."""

    norm_eps: float = option(1e-5, aliases=("rms_norm_eps", "layer_norm_epsilon"), gt=0)
    """Added inside the norms' square roots."""

    dropout: float = option(0.0, aliases=("resid_pdrop",), ge=0.0, lt=1.0)
    """Share dropped of the embedding and of each half's output while training."""

    initializer_range: float = option(0.02, aliases=("init_std",), gt=0)
    """Standard deviation of initial weights; projections into the residual stream start at 1/sqrt(2 layers) of it."""

    @model_validator(mode="after")
    def _heads_fit(self) -> DecoderConfig:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            fits = [n for n in range(1, self.hidden_size + 1) if self.hidden_size % n == 0 and n <= 64]
            raise ValueError(f"hidden_size = {self.hidden_size} does not divide by num_heads = {self.num_heads}; "
                             f"num_heads may be {', '.join(map(str, fits))}")  # fmt: skip
        if self.rotary and self.width_of_head % 2:
            raise ValueError(f"head_dim = {self.width_of_head} must be even for rotary positions")
        if self.num_heads % self.groups:
            raise ValueError(f"num_heads = {self.num_heads} does not divide by num_kv_heads = {self.groups}")
        return self

    @property
    def rotary(self) -> bool:
        """Positions turn queries and keys."""
        return True

    @property
    def width_of_head(self) -> int:
        """Numbers of a head: head_dim, else hidden_size / num_heads."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def inner(self) -> int:
        """Width inside a SwiGLU."""
        return self.intermediate_size or -(-8 * self.hidden_size // 3 // 64) * 64
