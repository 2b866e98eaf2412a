"""The encoder-decoder transformer: reads a source both ways and writes a target that attends to it.

The source travels beside the tokens: extras["source"] (token ids [B, S]) and, where sources are padded,
extras["source_mask"] (bool [B, S], true on real tokens). While decoding it comes with the prompt alone and is kept in the
state. RMSNorm before each part, rotary positions in both halves, one embedding for source, target and (tied) head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.layers.attention import Attention
from treadle.layers.bidirectional_attention import BidirectionalAttention, CrossAttention
from treadle.layers.context import Context
from treadle.layers.mlp import SwiGLU
from treadle.layers.norm import RMSNorm
from treadle.layers.rope import rotation
from treadle.layers.state import KeyValueCache, State
from treadle.models.backbone import run_blocks
from treadle.models.base import Capabilities, Model, ModelConfig, Output
from treadle.models.decoder import DecoderConfig
from treadle.settings import option

SOURCE, SOURCE_MASK = "source", "source_mask"


class EncoderDecoderConfig(DecoderConfig):
    """The encoder-decoder's keys; num_layers are the decoder's."""

    encoder_layers: int | None = option(None, aliases=("num_encoder_layers",), ge=1, le=4096)
    """Blocks of the encoder; default num_layers."""

    source_length: int = option(64, aliases=("max_source_length",), ge=1)
    """Tokens in the longest source; a decoding state keeps as many."""

    @property
    def encoder_depth(self) -> int:
        """Blocks of the encoder; as many as the decoder's where nothing is said."""
        return self.encoder_layers or self.num_layers


class EncoderBlock(nn.Module):
    """Bidirectional attention and MLP, each added to the residual stream."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = (RMSNorm(config.hidden_size, config.norm_eps) for _ in range(2))
        self.attention = BidirectionalAttention(config.hidden_size, config.num_heads, config.groups, config.width_of_head, qk_norm=config.qk_norm)
        self.mlp = SwiGLU(config.hidden_size, config.inner)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x: Tensor, context: Context, state: Any = None) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        x = x + self.dropout(self.attention(self.attention_norm(x), context))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


@dataclass
class DecoderContext(Context):
    """What the decoder's blocks share: the encoded source [B, S, D] (None: the state has it) and its mask."""

    source: Tensor | None = None
    source_mask: Tensor | None = None


@dataclass
class DecoderLayerState(KeyValueCache):
    """Keys and values of what was written, and those of the source [B, G, S, E] with its mask, bool [B, S]."""

    source_keys: Tensor
    source_values: Tensor
    source_mask: Tensor

    def keep_source(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """Takes a source that came with the prompt."""
        length = keys.shape[2]
        for kept, given in ((self.source_keys, keys), (self.source_values, values)):
            kept[:, :, :length] = given.detach().to(kept.dtype)
        self.source_mask[:, :length] = True if mask is None else mask


class DecoderBlock(nn.Module):
    """Causal attention, attention to the source, and MLP, each added to the residual stream."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        shape = (config.hidden_size, config.num_heads, config.groups, config.width_of_head)
        self.attention_norm, self.source_norm, self.mlp_norm = (RMSNorm(config.hidden_size, config.norm_eps) for _ in range(3))
        self.attention = Attention(*shape, qk_norm=config.qk_norm)
        self.source_attention = CrossAttention(*shape)
        self.mlp = SwiGLU(config.hidden_size, config.inner)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x: Tensor, context: DecoderContext, state: DecoderLayerState | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; the source stands in the context, or in the state of a decoding."""
        x = x + self.dropout(self.attention(self.attention_norm(x), context, state))
        x = x + self.dropout(self.source_attention(self.source_norm(x), *self._source(context, state)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

    def _source(self, context: DecoderContext, state: DecoderLayerState | None) -> tuple[Tensor, Tensor, Tensor | None]:
        if context.source is None:
            assert state is not None
            return state.source_keys, state.source_values, state.source_mask
        keys, values = self.source_attention.encode(context.source)
        if state is not None:
            state.keep_source(keys, values, context.source_mask)
        return keys, values, context.source_mask


class EncoderDecoder(Model):
    """Encoder-decoder transformer (Vaswani et al. 2017, arXiv 1706.03762)."""

    arch = "encoder_decoder"
    Config = EncoderDecoderConfig
    config: EncoderDecoderConfig
    capabilities = Capabilities(packs=False)  # a row has one source

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_depth))
        self.layers = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_layers))
        self.source_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def blocks(self) -> list[nn.Module]:
        return [*self.encoder, *self.layers]

    @classmethod
    def example(cls, config: ModelConfig, batch_size: int = 2, length: int = 16, seed: int = 0) -> Batch:
        batch = super().example(config, batch_size, length, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        shape = (batch_size, config.source_length)  # type: ignore[attr-defined]
        batch.extras[SOURCE] = torch.randint(0, config.vocab_size, shape, generator=generator)  # type: ignore[attr-defined]
        return batch

    def encode(self, source: Tensor, mask: Tensor | None) -> Tensor:
        """source [B, S], mask bool [B, S] or None -> [B, S, D]. ConfigError when it is longer than source_length."""
        rows, length = source.shape
        if length > self.config.source_length:
            raise ConfigError(f"a source of {length} tokens, but the model has source_length = {self.config.source_length}; "
                              f"--model.source_length {length}")  # fmt: skip
        positions = torch.arange(length, device=source.device).expand(rows, length)
        documents = None if mask is None else mask.long() - 1
        context = Context(documents, rotary=rotation(positions, self.config.width_of_head, self.config.rope_theta))
        return self.source_norm(run_blocks(self.encoder, self.embedding(source), context, None))

    def hidden(self, batch: Batch, state: State | None = None) -> Output:
        """As Model.hidden, of a batch whose extras have "source" [B, S] (and "source_mask"); ConfigError without a source."""
        source, mask = batch.extras.get(SOURCE), batch.extras.get(SOURCE_MASK)
        if source is None and (state is None or state.used == 0):
            raise ConfigError("an encoder-decoder reads a source beside its tokens: give it as Batch(extras={'source': ids [B, S]}), or to "
                              "generate as extras={'source': ids}")  # fmt: skip
        context = DecoderContext()
        if not batch.is_unpacked:
            context = DecoderContext(batch.doc_ids, batch.segments)
        if source is not None:
            context.source, context.source_mask = self.encode(source, mask), mask
        positions = batch.position_ids
        if state is not None:
            context.token_positions = state.token_positions(*batch.shape, batch.doc_ids, batch.segments)
            context.used, positions = state.used, context.token_positions.position_ids
        assert positions is not None
        context.rotary = rotation(positions, self.config.width_of_head, self.config.rope_theta)
        x = run_blocks(self.layers, self.embedding(batch.input_ids), context, iter(state.layers) if state is not None else None)
        return Output(hidden=self.norm(x), state=state)

    def new_state(self, batch_size: int, max_len: int, device: Any = None, dtype: Any = None) -> State:
        device, dtype, c = device or self.device, dtype or self.dtype, self.config
        made = []
        for _ in self.layers:
            own = KeyValueCache.empty(batch_size, c.groups, max_len, c.width_of_head, device, dtype)
            shape = (batch_size, c.groups, c.source_length, c.width_of_head)
            of_source = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)]
            mask = torch.zeros(shape[0], shape[2], dtype=torch.bool, device=device)
            made.append(DecoderLayerState(own.keys, own.values, of_source[0], of_source[1], mask))
        return State(torch.zeros(batch_size, dtype=torch.int64, device=device), [0] * batch_size, max_len, made)

    def flops(self, length: int) -> int:
        """With a source of source_length tokens."""
        c, source = self.config, self.config.source_length
        mlp = 3 * c.hidden_size * c.inner
        encoder = c.encoder_depth * (self.encoder[0].attention.flops(source) + 2 * source * mlp)  # type: ignore[operator, union-attr]
        decoder = self.layers[0].attention.flops(length) + self.layers[0].source_attention.flops(length, source) + 2 * length * mlp  # type: ignore[operator, union-attr]
        return encoder + c.num_layers * decoder + 2 * length * c.hidden_size * c.vocab_size

    def initial(self, name: str, parameter: Tensor) -> float | str | Tensor:
        if parameter.dim() < 2:
            return "ones"
        std, depth = self.config.initializer_range, len(self.encoder) if name.startswith("encoder.") else len(self.layers)
        parts = 2 if name.startswith("encoder.") else 3
        return std / (parts * depth) ** 0.5 if name.endswith(("attention.out.weight", "mlp.down.weight")) else std
