"""The keys of token mixers other than full attention (`layer_types`), which a model of any such blocks has."""

from __future__ import annotations

from pydantic import model_validator

from treadle.models.decoder import DecoderConfig
from treadle.settings import option


class MixerKeys(DecoderConfig):
    """Keys that the mixers of layers/mixers/ read; the width and number of their heads are those of attention."""

    expand_ratio: int | None = option(None, aliases=("expand", "expand_v"), ge=1, le=16)
    """Width inside a recurrent mixer as a multiple of hidden_size: of ssd and hgrn as a whole, of the values in retnet and
    gated_deltanet. Default 2, and 1 in hgrn."""

    state_size: int = option(64, aliases=("d_state", "ssm_state_size"), ge=1)
    """Features N of the memory of ssd: a head holds N numbers for each of its channels."""

    convolution_size: int = option(4, aliases=("conv_size", "conv_kernel", "d_conv"), ge=0, le=16)
    """Positions that the short convolution of ssd, hgrn and gated_deltanet sees; 0 is none, 4 is usual."""

    low_rank_size: int = option(32, ge=1)
    """Width inside the low-rank maps of rwkv that make its token shift and its decay depend on the text (at most
    hidden_size)."""

    attention_block_size: int = option(64, aliases=("sparse_block_size",), ge=1)
    """Positions in a block of block_sparse_attention, counted from the beginning of each document."""

    previous_blocks: int = option(1, ge=0)
    """Whole blocks before its own that a position of block_sparse_attention sees."""

    global_tokens: int = option(4, aliases=("num_global_tokens",), ge=0)
    """First positions of a document that all later ones see in block_sparse_attention."""

    @model_validator(mode="after")
    def _mixers_fit(self) -> MixerKeys:
        if self.convolution_size == 1:
            raise ValueError("convolution_size = 1 sees one position alone; use 0 for none, or 4")
        return self

    def expanded(self, default: int) -> int:
        """expand_ratio, or a mixer's own default."""
        return self.expand_ratio if self.expand_ratio is not None else default

    def check_mixers(self, names: list[str]) -> None:
        """ValueError where a mixer of these cannot have these heads."""
        for name, default in (("ssd", 2), ("hgrn", 1)):
            inner = self.expanded(default) * self.hidden_size
            if name in names and inner % self.num_heads:
                raise ValueError(f"{name} is {inner} wide inside (hidden_size x {self.expanded(default)}), which does not divide by "
                                 f"num_heads = {self.num_heads}; choose --num_heads or --expand_ratio so that it does")  # fmt: skip
