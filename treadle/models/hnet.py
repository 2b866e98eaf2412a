"""The hierarchical byte model: outer stages over bytes find chunks, an inner and wider stage runs over chunks alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor, nn

from treadle.data.batch import PAD, Batch
from treadle.layers.context import Context
from treadle.layers.hgrn import linear
from treadle.layers.hierarchy import (
    Boundaries,
    BoundaryRouter,
    PositionCounter,
    StageState,
    compact,
    empty_state,
    most_chunks,
    planned_chunks,
    ratio_loss,
    smooth,
    straight_through,
)  # fmt: skip
from treadle.layers.reproducible import ReproducibleLinear, ReproducibleRMSNorm
from treadle.layers.rope import rotation
from treadle.layers.state import State, TokenPositions
from treadle.models.backbone import run_blocks
from treadle.models.base import Capabilities, Model, Output, ParameterRule
from treadle.models.recurrent import INTO_STREAM, Block, Mixer, RecurrentConfig, block_initial, block_rule
from treadle.ops.documents import document_positions
from treadle.ops.precision import without_autocast
from treadle.settings import option


class HNetConfig(RecurrentConfig):
    """The hierarchical model's keys."""

    hidden_sizes: list[int] = option([128, 192], aliases=("d_model", "hidden_size"))
    """Width of each stage, outermost first; never narrower inside."""

    num_blocks: list[list[int]] = option([[1, 0, 1], [4]])
    """[encoder, 0, decoder] blocks of each outer stage, then [blocks] of the innermost."""

    token_mixers: list[Mixer | list[Mixer]] | None = option(None, aliases=("mixers",))
    """The token mixer of each stage: hgrn_bit, hgrn, attention (over the last local_window positions) or ssm; a list is
    a pattern that repeats over the stage's blocks. Without it hgrn_bit everywhere (hgrn with ternary off)."""

    local_window: int = option(64, aliases=("window_size", "sliding_window"), ge=1)
    """Positions that an attention block sees; in an inner stage these are chunks."""

    attention_heads: int = option(4, ge=1)
    """Heads of attention and ssm blocks; half a head's width must be whole in every stage that has them."""

    target_ratios: list[float] | None = option(None)
    """Tokens per chunk at each outer stage that the ratio loss aims at; default 6 for one stage, 3 each for more."""

    ratio_weight: float = option(0.03, ge=0.0)
    """Weight of the ratio loss."""

    stage_learning_rates: bool = option(True)
    """Each stage's learning rate by its width and the number of tokens it sees (H-Net, appendix C)."""

    router_learning_rate: float = option(10.0, gt=0)
    """Learning rate of the routers as a multiple of their stage's. They start as the identity, with entries fifty times those
    of other matrices, and would follow the stream they read too slowly: chunks nearly vanish for some twenty steps at 1."""

    @model_validator(mode="after")
    def _stages_fit(self) -> HNetConfig:
        if len(self.hidden_sizes) != len(self.num_blocks):
            raise ValueError(f"hidden_sizes has {len(self.hidden_sizes)} stages and num_blocks {len(self.num_blocks)}; give one "
                             "entry for each stage")  # fmt: skip
        if len(self.hidden_sizes) < 2:
            raise ValueError("one stage has no hierarchy; give two or more, or use --model.arch hgrn_bit")
        for number, blocks in enumerate(self.num_blocks):
            last = number + 1 == len(self.num_blocks)
            if (last and len(blocks) != 1) or (not last and (len(blocks) != 3 or blocks[1] != 0)):
                wanted = "[blocks]" if last else "[encoder, 0, decoder]"
                raise ValueError(f"num_blocks[{number}] = {blocks}: this stage takes {wanted}")
        if any(a > b for a, b in zip(self.hidden_sizes, self.hidden_sizes[1:])):
            raise ValueError(f"hidden_sizes = {self.hidden_sizes}: an inner stage may not be narrower than the one around it")
        self.check_widths(*self.hidden_sizes)
        if self.token_mixers is not None and (len(self.token_mixers) != len(self.hidden_sizes) or [] in self.token_mixers):
            raise ValueError(f"token_mixers = {self.token_mixers}: give one entry (or a list) for each of {len(self.hidden_sizes)} stages")
        for stage, width in enumerate(self.hidden_sizes):
            if {"attention", "ssm"} & set(self.pattern(stage)) and width % (2 * self.attention_heads):
                raise ValueError(f"hidden_sizes[{stage}] = {width} does not divide into attention_heads = {self.attention_heads} "
                                 "heads of even width")  # fmt: skip
        ratios = self.ratios
        if len(ratios) != len(self.hidden_sizes) - 1 or any(r <= 1 for r in ratios):
            raise ValueError(f"target_ratios = {ratios}: give {len(self.hidden_sizes) - 1} number(s) above 1, one for each outer "
                             "stage")  # fmt: skip
        return self

    @property
    def ratios(self) -> list[float]:
        """Positions a chunk that each router aims at, from the bytes inwards."""
        if self.target_ratios is not None:
            return self.target_ratios
        outer = len(self.hidden_sizes) - 1
        return [6.0] if outer == 1 else [3.0] * outer

    def pattern(self, stage: int) -> list[Mixer]:
        """The mixers of a stage's blocks, repeated over them."""
        if self.token_mixers is None:
            return ["hgrn_bit" if self.ternary else "hgrn"]
        given = self.token_mixers[stage]
        return given if isinstance(given, list) else [given]

    @property
    def rounds(self) -> bool:
        """Some block rounds to integers."""
        return any("hgrn_bit" in self.pattern(stage) for stage in range(len(self.hidden_sizes)))

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        return {
            "hnet_bit_1stage": {"vocab_size": 256, "hidden_sizes": [256, 384], "num_blocks": [[3, 0, 3], [12]]},
            "hnet_bit_2stage": {"vocab_size": 256, "hidden_sizes": [512, 768, 1024], "num_blocks": [[1, 0, 1], [1, 0, 1], [3]]},
        }

    @classmethod
    def preset_sizes(cls) -> dict[str, float]:
        """Parameters of each preset, exactly."""
        return {"hnet_bit_1stage": 35_005_952, "hnet_bit_2stage": 80_486_144}

    @classmethod
    def recommended(cls, preset: str | None) -> dict[str, Any]:
        if preset is None:
            return {}
        return {"optim.learning_rate": 2e-4, "optim.lr_scheduler_type": "wsd", "tokenizer.name": "byte",
                "train.per_device_train_batch_size": 16, "train.max_steps": 30_000}  # fmt: skip


class Stage(nn.Module):
    """One level: blocks alone (innermost), or encoder, router, the stage inside, de-chunking, decoder."""

    def __init__(self, config: HNetConfig, index: int) -> None:
        super().__init__()
        width, counts = config.hidden_sizes[index], config.num_blocks[index]
        self.innermost = len(counts) == 1
        self.target = None if self.innermost else config.ratios[index]
        self.outermost = index == 0
        self.tracks_positions = any(mixer in ("attention", "ssm") for mixer in config.pattern(index))
        self.head_width, self.reproducible = width // config.attention_heads, config.rounds

        def blocks(first: int, count: int) -> nn.ModuleList:
            pattern = config.pattern(index)
            return nn.ModuleList(
                Block(config, width, pattern[number % len(pattern)], reproducible=config.rounds, window=config.local_window,
                      heads=config.attention_heads) for number in range(first, first + count)
            )  # fmt: skip

        self.encoder = blocks(0, counts[0])
        self.encoder_norm = ReproducibleRMSNorm(width, config.norm_eps)
        if self.innermost:
            return
        inner = config.hidden_sizes[index + 1]
        self.router = BoundaryRouter(width)
        self.residual = ReproducibleLinear(width, width)
        self.widening = nn.Parameter(torch.zeros(inner - width)) if inner > width else None
        self.inner = Stage(config, index + 1)
        self.decoder = blocks(counts[0], counts[2])
        self.decoder_norm = ReproducibleRMSNorm(width, config.norm_eps)

    def own_blocks(self) -> list[nn.Module]:
        """The blocks of this level, without those of the stages inside."""
        return [*self.encoder, *(() if self.innermost else self.decoder)]

    def blocks(self) -> list[nn.Module]:
        """All blocks in the order in which they run, those of the stages inside too."""
        inside = [] if self.innermost else [*self.inner.blocks(), *self.decoder]
        return [*self.encoder, *inside]

    @property
    def memories(self) -> int:
        """Entries of `states`."""
        return self.tracks_positions + len(self.own_blocks()) + (0 if self.innermost else 1 + self.inner.memories)

    def states(self, rows: int, max_len: int, device: Any, dtype: Any) -> list[Any]:
        """Decoding states in the order that `forward` takes them."""
        made: list[Any] = [PositionCounter(torch.zeros(rows, dtype=torch.int64, device=device))] if self.tracks_positions else []
        made += [block.new_state(rows, max_len, device, dtype) for block in self.encoder]  # type: ignore[operator]
        if not self.innermost:
            inner = self.inner.encoder_norm.weight.shape[0]
            made.append(empty_state(rows, self.encoder_norm.weight.shape[0], inner, device))
            made += self.inner.states(rows, max_len, device, dtype)
            made += [block.new_state(rows, max_len, device, dtype) for block in self.decoder]  # type: ignore[operator]
        return made

    def forward(
        self, x: Tensor, token_mask: Tensor, doc_ids: Tensor | None, states: Iterator[Any] | None, found: list[tuple[Boundaries, Tensor]],
    ) -> Tensor:  # fmt: skip
        """x [B, T, D]; token_mask [B, T], with states all tokens before the padding. `found` takes each stage's boundaries."""
        context = self._context(token_mask, doc_ids, states)
        x = self.encoder_norm(run_blocks(self.encoder, x, context, states))
        if self.innermost:
            return x
        own: StageState | None = next(states) if states is not None else None
        boundaries = self.router(x, token_mask, doc_ids, own)
        found.append((boundaries, token_mask))
        y = self._inside(x, token_mask, boundaries, doc_ids, own, states, found)
        share = torch.where(boundaries.mask, boundaries.probability, 1.0 - boundaries.probability)
        with without_autocast(x):
            y = y * straight_through(share)[..., None] + self.residual(x.float())
        if own is not None:
            count = token_mask.sum(1)
            last = x.gather(1, (count - 1).clamp_min(0)[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]
            own.last = torch.where((count > 0)[:, None], last, own.last).detach()
            own.seen = own.seen | (count > 0)
        return self.decoder_norm(run_blocks(self.decoder, y, context, states))

    def _context(self, token_mask: Tensor, doc_ids: Tensor | None, states: Iterator[Any] | None) -> Context:
        """What this stage's blocks share; positions count from each document's start, in chunks in an inner stage."""
        context = Context(doc_ids)
        positions = token_mask  # recurrences know none
        if self.tracks_positions:
            seen = next(states) if states is not None else None
            documents = torch.zeros_like(token_mask) if doc_ids is None else doc_ids
            positions = document_positions(documents) if seen is None else seen.advance(token_mask)
            wide = torch.float64 if self.reproducible and not torch.is_grad_enabled() else torch.float32
            context.rotary = rotation(positions, self.head_width, dtype=wide)
        if states is not None:
            context.token_positions = TokenPositions(token_mask, positions, positions)
        return context

    def _inside(
        self, x: Tensor, token_mask: Tensor, boundaries: Boundaries, doc_ids: Tensor | None, own: StageState | None,
        states: Iterator[Any] | None, found: list[tuple[Boundaries, Tensor]],
    ) -> Tensor:  # fmt: skip
        """Chunk, the inner stage, de-chunk: [B, T, D]."""
        boundary_mask = boundaries.mask
        assert self.target is not None
        longest = most_chunks(boundary_mask, planned_chunks(x.shape[1], self.target, self.training, self.outermost))
        if longest == 0 and own is not None and states is not None:  # no chunk begins: the stages inside stand still
            for _ in range(self.inner.memories):
                next(states)
            return own.smoothed[:, None, : x.shape[2]].expand(-1, x.shape[1], -1)
        longest = max(1, longest)
        chunks, order = compact(x, boundary_mask, longest)
        chunk_mask = boundary_mask.gather(1, order)
        inner_docs = None
        if own is None:
            inner_docs = torch.where(chunk_mask, doc_ids.gather(1, order) if doc_ids is not None else 0, PAD)
        if self.widening is not None:
            chunks = torch.cat([chunks, self.widening.expand(*chunks.shape[:2], -1).to(chunks.dtype)], -1)
        chunks = self.inner(chunks, chunk_mask, inner_docs, states, found)
        with without_autocast(x):
            smoothed = smooth(chunks, boundaries.probability.gather(1, order), inner_docs, chunk_mask, own.smoothed if own else None)
        number = boundary_mask.cumsum(1) - 1  # which chunk each position is in
        if own is not None:
            before = own.smoothed
            own.smoothed = smoothed[:, -1].detach()  # padding changed nothing
            smoothed, number = torch.cat([before[:, None], smoothed], 1), number + 1
        index = number.clamp_min(0)[..., None].expand(-1, -1, smoothed.shape[2])
        return smoothed.gather(1, index)[..., : x.shape[2]]


class HNet(Model):
    """Hierarchical byte model with learned chunks (arXiv 2507.07955) over ternary recurrences (arXiv 2406.02528)."""

    arch = "hnet"
    Config = HNetConfig
    config: HNetConfig

    def __init__(self, config: HNetConfig) -> None:
        super().__init__()
        self.config = config
        self.capabilities = Capabilities(dynamic_lengths=True, rounds=config.rounds or config.ternary)
        width = config.hidden_sizes[0]
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.stage = Stage(config, 0)
        self.head = linear(width, config.vocab_size, config.ternary)  # type: ignore[assignment]

    def blocks(self) -> list[nn.Module]:
        return self.stage.blocks()

    def hidden(self, batch: Batch, state: State | None = None) -> Output:
        x, found = self.embedding(batch.input_ids), []  # type: ignore[var-annotated]
        if state is None:
            doc_ids = None if batch.is_unpacked else batch.doc_ids
            token_mask = batch.token_mask
            return self._output(self.stage(x, token_mask, doc_ids, None, found), found)
        token_mask = state.token_positions(*batch.shape, batch.doc_ids, batch.segments).token_mask
        x, order = compact(x, token_mask, x.shape[1])
        y = self.stage(x, token_mask.gather(1, order), None, iter(state.layers), found)
        y = torch.zeros_like(y).scatter(1, order[..., None].expand_as(y), y)
        return Output(hidden=y, state=state)

    def _output(self, hidden: Tensor, found: list[tuple[Boundaries, Tensor]]) -> Output:
        out = Output(hidden=hidden)
        tokens = found[0][1].sum(1)
        total = hidden.new_zeros((), dtype=torch.float32)
        with without_autocast(hidden):
            for stage, (boundaries, token_mask) in enumerate(found):
                loss = ratio_loss(boundaries, token_mask, self.config.ratios[stage])
                total = total + (loss * tokens).sum()
                positions = token_mask.sum().clamp_min(1)
                out.stats[f"boundary_rate_{stage}"] = boundaries.mask.sum().detach() / positions
                out.stats[f"tokens_per_chunk_{stage}"] = tokens.sum() / boundaries.mask.sum().clamp_min(1)
                out.stats[f"ratio_loss_{stage}"] = (loss.detach() * tokens).sum() / tokens.sum().clamp_min(1)
        out.losses["ratio"] = (total * self.config.ratio_weight, "tokens")
        return out

    @torch.no_grad()
    def boundaries(self, batch: Batch) -> list[Tensor]:
        """Where chunks begin, bool [B, T] for each stage; an inner stage's at the tokens that its chunks begin with."""
        found: list[tuple[Boundaries, Tensor]] = []
        doc_ids = None if batch.is_unpacked else batch.doc_ids
        self.stage(self.embedding(batch.input_ids), batch.token_mask, doc_ids, None, found)
        made, positions = [], torch.arange(batch.shape[1], device=batch.device).expand(batch.shape)
        for boundaries, _ in found:
            marks = torch.zeros(batch.shape, dtype=torch.bool, device=batch.device)
            marks.scatter_(1, positions, boundaries.mask)
            made.append(marks)
            positions, _ = compact(positions, boundaries.mask, most_chunks(boundaries.mask, boundaries.mask.shape[1]))
        return made

    def new_state(self, batch_size: int, max_len: int, device: Any = None, dtype: Any = None) -> State:
        device, dtype = device or self.device, dtype or self.dtype
        layers = self.stage.states(batch_size, max_len, device, dtype)
        return State(torch.zeros(batch_size, dtype=torch.int64, device=device), [0] * batch_size, max_len, layers)

    def flops(self, length: int) -> int:
        """With as many chunks as the ratio loss wants; what a batch really costs depends on its text."""
        c, expected, stage = self.config, float(length), self.stage
        total = 2 * length * c.hidden_sizes[0] * c.vocab_size
        for width, ratio in zip(c.hidden_sizes, [*c.ratios, 1.0]):
            here = math.ceil(expected)
            total += sum(block.flops(here) for block in stage.own_blocks())  # type: ignore[operator]
            if not stage.innermost:
                total += 2 * here * 3 * width * width
                stage, expected = stage.inner, expected / ratio
        return total

    def parameter_rules(self) -> dict[str, ParameterRule]:
        c, rules = self.config, {}
        for name, _ in self.named_parameters():
            rate = _stage_rate(c, name.count("inner.")) if c.stage_learning_rates else 1.0
            rate *= c.router_learning_rate if ".router." in name else 1.0
            rules[name] = replace(block_rule(name), learning_rate_multiplier=round(rate, 6))
        return rules

    def initial(self, name: str, parameter: Tensor) -> float | str | Tensor:
        if name == "embedding.weight":
            return 1.0
        if name.endswith(("router.query.weight", "router.key.weight")):
            return torch.eye(parameter.shape[0])
        if name.endswith((".residual.weight", ".residual.bias")):
            return "zeros"
        if name.endswith("widening"):
            return self.config.initializer_range
        special = block_initial(name, parameter)
        if special is not None:
            return special
        std = self.config.initializer_range
        if name.endswith(INTO_STREAM):
            around = sum(sum(counts) for counts in self.config.num_blocks[: name.count("inner.") + 1])
            return std / math.sqrt(2 * around)
        return std


def _stage_rate(config: HNetConfig, stage: int) -> float:
    """sqrt(4.6 prod_{i >= s} N_i / prod_i N_i D_S / D_s), N_S = 1."""
    ratios, widths = config.ratios, config.hidden_sizes
    return math.sqrt(4.6 * math.prod(ratios[stage:]) / math.prod(ratios) * widths[-1] / widths[stage])
