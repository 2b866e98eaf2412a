"""What most architectures share: embedding -> blocks -> norm -> head, with checkpointing and a decoding state.

A family overrides `embed` (what the first block reads), `final_norm` (what the head reads), `make_block` and
`layer_state`; the walk through the blocks is written here once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from treadle.data.batch import Batch
from treadle.layers.context import Context
from treadle.layers.state import State
from treadle.models.base import LanguageModelConfig, Model, Output
from treadle.ops.document_attention import document_ends
from treadle.ops.precision import without_kept_casts


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, context: Context, states: Iterator[Any] | None) -> Tensor:
    """Runs x through the blocks, with gradient checkpointing where a block asks for it; with states, each takes the next.
    x [B, T, ...] -> the same shape."""
    for block in blocks:
        state = next(states) if states is not None else None
        if block.training and torch.is_grad_enabled() and getattr(block, "gradient_checkpointing", False):
            with without_kept_casts(x):  # the block's weights are cast again anyway when it runs again
                x = checkpoint(block, x, context, state, use_reentrant=False)
        else:
            x = block(x, context, state)
    return x


class Backbone(Model):
    """Embedding, blocks, final norm and a (tied) head."""

    embedding: nn.Embedding
    norm: nn.Module

    def __init__(self, config: LanguageModelConfig, width: int, count: int, norm: nn.Module, tied: bool) -> None:
        super().__init__()
        self.config = config
        self.tied = tied
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(self.make_block(i) for i in range(count))
        self.norm = norm
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        self.tie()

    def make_block(self, index: int) -> nn.Module:
        """Block number `index`, called as block(x, context, layer_state) -> x."""
        raise NotImplementedError

    def context(self, batch: Batch, state: State | None) -> Context:
        """What the blocks of this pass share."""
        context = Context()
        if not batch.is_unpacked:  # unpacked rows look alike at every step, which keeps compiled blocks from recompiling
            compiled = self.layers[0]._compiled_call_impl is not None
            ends = document_ends(batch.segments, batch.input_ids.device) if state is None else None
            context = Context(batch.doc_ids, None if compiled else batch.segments, document_ends=ends)
        if state is not None:
            context.token_positions = state.token_positions(*batch.shape, batch.doc_ids, batch.segments)
            context.used = state.used
        return context

    def embed(self, batch: Batch, context: Context) -> Tensor:
        """The residual stream before the first block. [B, T, D], or what else the blocks of an architecture carry."""
        return self.embedding(batch.input_ids)  # [B, T, D]

    def final_norm(self, x: Tensor) -> Tensor:
        """The residual stream after the last block, normalised for the head: [B, T, D]."""
        return self.norm(x)

    def tie(self) -> None:
        if self.tied:
            self.head.weight = self.embedding.weight

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def token_mixers(self) -> list[nn.Module]:
        return [block.attention for block in self.layers]  # type: ignore[misc]

    def run_token_mixers(self, given: list[Tensor], batch: Batch) -> list[Tensor]:
        context = self.context(batch, None)
        context.token_mixer_only = True  # through the block, which may have to gather its weights first
        return [block(x, context) for block, x in zip(self.layers, given)]

    def hidden(self, batch: Batch, state: State | None = None) -> Output:
        context = self.context(batch, state)
        x = self.embed(batch, context)
        x = run_blocks(self.layers, x, context, iter(state.layers) if state is not None else None)
        return Output(hidden=self.final_norm(x), state=state)

    def layer_state(self, index: int, batch_size: int, max_len: int, device: Any, dtype: Any) -> Any:
        """The decoding memory of block `index`."""
        raise NotImplementedError

    def new_state(self, batch_size: int, max_len: int, device: Any = None, dtype: Any = None) -> State:
        device, dtype = device or self.device, dtype or self.dtype
        made = [self.layer_state(i, batch_size, max_len, device, dtype) for i in range(len(self.layers))]
        return State(torch.zeros(batch_size, dtype=torch.int64, device=device), [0] * batch_size, max_len, made)
