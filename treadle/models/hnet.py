"""The hierarchical byte model: outer stages over bytes find chunks, an inner and wider stage runs over chunks alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from treadle.data.batch import PAD, Batch
from treadle.layers.attention import Context
from treadle.layers.exact import ExactRMSNorm, exact
from treadle.layers.hgrn import linear
from treadle.layers.hierarchy import (
    Boundaries,
    BoundaryRouter,
    StageState,
    compact,
    empty_state,
    most_chosen,
    ratio_loss,
    smooth,
    straight_through,
)  # fmt: skip
from treadle.layers.state import Places, State
from treadle.models.backbone import through
from treadle.models.base import Capabilities, Model, ModelConfig, Output, ParameterRule
from treadle.models.hgrn_bit import Block, HGRNBitConfig
from treadle.settings import option


class HNetConfig(ModelConfig):
    """The hierarchical model's keys."""

    hidden_sizes: list[int] = option([128, 192], aliases=("d_model", "hidden_size"))
    """Width of each stage, outermost first; never narrower inside."""

    num_blocks: list[list[int]] = option([[1, 0, 1], [4]])
    """[encoder, 0, decoder] blocks of each outer stage, then [blocks] of the innermost."""

    target_ratios: list[float] | None = option(None)
    """Symbols a chunk at each outer stage, as the ratio loss wants them; default 6 for one stage, 3 each for more."""

    ratio_weight: float = option(0.03, ge=0.0)
    """Weight of the ratio loss."""

    ternary: bool = option(True)
    """Off: ordinary fp32 matrices (plain HGRN blocks)."""

    expand_ratio: int = option(1, ge=1)
    """Width of a block's recurrence: this times the stage's width."""

    hidden_ratio: int = option(4, ge=1)
    """Width of a block's MLP: this times the stage's width."""

    mlp_width: Literal["full", "matmulfree"] = option("full")
    """full: hidden_ratio D; matmulfree: two thirds of it, rounded up to a multiple of 256."""

    num_heads: int = option(1, aliases=("n_heads",), ge=1)
    """Parts that the norm of a recurrence's output is split into."""

    convolution_size: int = option(0, aliases=("conv_size",), ge=0, le=16)
    """Places that a short convolution before the gates sees; 0 is none."""

    scan_backend: Literal["auto", "native", "loop", "triton"] = option(
        "auto", aliases=("attn_mode",), spellings={"fused_recurrent": "triton", "chunk": "auto"}
    )
    """How the recurrence is computed; all ways agree."""

    stage_learning_rates: bool = option(True)
    """Each stage's learning rate by its width and the symbols it sees (H-Net, appendix C)."""

    norm_eps: float = option(1e-6, aliases=("rms_norm_eps",), gt=0)
    """Added inside the norms' square roots."""

    initializer_range: float = option(0.02, aliases=("init_std",), gt=0)
    """Standard deviation of initial weights; projections into a stream are divided by the root of the blocks around."""

    max_position_embeddings: int | None = option(None, ge=2)
    """The length of training rows where data.seq_len is not given; a recurrence itself has no longest row."""

    def implied(self) -> dict[str, Any]:
        return {"data.seq_len": self.max_position_embeddings} if self.max_position_embeddings is not None else {}

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
        ratios = self.ratios
        if len(ratios) != len(self.hidden_sizes) - 1 or any(r <= 1 for r in ratios):
            raise ValueError(f"target_ratios = {ratios}: give {len(self.hidden_sizes) - 1} number(s) above 1, one for each outer "
                             "stage")  # fmt: skip
        return self

    @property
    def ratios(self) -> list[float]:
        if self.target_ratios is not None:
            return self.target_ratios
        outer = len(self.hidden_sizes) - 1
        return [6.0] if outer == 1 else [3.0] * outer

    def block_config(self, stage: int) -> HGRNBitConfig:
        return HGRNBitConfig(
            hidden_size=self.hidden_sizes[stage], ternary=self.ternary, expand_ratio=self.expand_ratio, mlp_width=self.mlp_width,
            hidden_ratio=self.hidden_ratio, num_heads=self.num_heads, convolution_size=self.convolution_size,
            scan_backend=self.scan_backend, norm_eps=self.norm_eps,
        )  # fmt: skip

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
                "train.per_device_train_batch_size": 16}  # fmt: skip


class Stage(nn.Module):
    """One level: blocks alone (innermost), or encoder, router, the stage inside, de-chunking, decoder."""

    def __init__(self, config: HNetConfig, index: int) -> None:
        super().__init__()
        width, counts = config.hidden_sizes[index], config.num_blocks[index]
        self.innermost = len(counts) == 1
        self.target = None if self.innermost else config.ratios[index]
        blocks = config.block_config(index)
        self.encoder = nn.ModuleList(Block(blocks) for _ in range(counts[0]))
        self.encoder_norm = ExactRMSNorm(width, config.norm_eps)
        if self.innermost:
            return
        inner = config.hidden_sizes[index + 1]
        self.router = BoundaryRouter(width)
        self.residual = nn.Linear(width, width)
        self.widening = nn.Parameter(torch.zeros(inner - width)) if inner > width else None
        self.inner = Stage(config, index + 1)
        self.decoder = nn.ModuleList(Block(blocks) for _ in range(counts[2]))
        self.decoder_norm = ExactRMSNorm(width, config.norm_eps)

    def blocks(self) -> list[nn.Module]:
        inside = [] if self.innermost else [*self.inner.blocks(), *self.decoder]
        return [*self.encoder, *inside]

    def states(self, rows: int, device: Any, dtype: Any) -> list[Any]:
        """Decoding states in the order that `forward` takes them."""
        made: list[Any] = [block.attention.empty(rows, device, dtype) for block in self.encoder]  # type: ignore[union-attr, operator]
        if not self.innermost:
            inner = self.inner.encoder_norm.weight.shape[0]
            made.append(empty_state(rows, self.encoder_norm.weight.shape[0], inner, device))
            made += self.inner.states(rows, device, dtype)
            made += [block.attention.empty(rows, device, dtype) for block in self.decoder]  # type: ignore[union-attr, operator]
        return made

    def forward(
        self, x: Tensor, real: Tensor, doc_ids: Tensor | None, states: Iterator[Any] | None, found: list[tuple[Boundaries, Tensor]],
    ) -> Tensor:  # fmt: skip
        """x [B, T, D]; real [B, T], with states all of them before the padding. `found` takes each stage's boundaries."""
        context = Context(doc_ids)
        if states is not None:
            context.places = Places(real, real.long(), real.long())
        x = self.encoder_norm(through(self.encoder, x, context, states))
        if self.innermost:
            return x
        own: StageState | None = next(states) if states is not None else None
        boundaries = self.router(x, real, doc_ids, own)
        found.append((boundaries, real))
        y = self._inside(x, real, boundaries, doc_ids, own, states, found)
        share = torch.where(boundaries.chosen, boundaries.probability, 1.0 - boundaries.probability)
        with torch.autocast(x.device.type, enabled=False):
            wide = exact(x)
            weight, bias = self.residual.weight.to(wide.dtype), self.residual.bias.to(wide.dtype)
            residual = nn.functional.linear(wide, weight, bias).float()
            y = y * straight_through(share)[..., None] + residual
        if own is not None:
            count = real.sum(1)
            last = x.gather(1, (count - 1).clamp_min(0)[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]
            own.last = torch.where((count > 0)[:, None], last, own.last).detach()
            own.seen = own.seen | (count > 0)
        return self.decoder_norm(through(self.decoder, y, context, states))

    def _inside(
        self, x: Tensor, real: Tensor, boundaries: Boundaries, doc_ids: Tensor | None, own: StageState | None,
        states: Iterator[Any] | None, found: list[tuple[Boundaries, Tensor]],
    ) -> Tensor:  # fmt: skip
        """Chunk, the inner stage, de-chunk: [B, T, D]."""
        chosen = boundaries.chosen
        assert self.target is not None
        longest = most_chosen(chosen, self.target)
        chunks, order = compact(x, chosen, longest)
        taken = chosen.gather(1, order)
        inner_docs = None
        if own is None:
            inner_docs = torch.where(taken, doc_ids.gather(1, order) if doc_ids is not None else 0, PAD)
        if self.widening is not None:
            chunks = torch.cat([chunks, self.widening.expand(*chunks.shape[:2], -1).to(chunks.dtype)], -1)
        chunks = self.inner(chunks, taken, inner_docs, states, found)
        with torch.autocast(x.device.type, enabled=False):
            smoothed = smooth(chunks, boundaries.probability.gather(1, order), inner_docs, taken, own.smoothed if own else None)
        number = chosen.cumsum(1) - 1  # which chunk each place is in
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
        self.capabilities = Capabilities(dynamic_lengths=True, rounds=config.ternary)
        width = config.hidden_sizes[0]
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.stage = Stage(config, 0)
        self.head = linear(width, config.vocab_size, config.ternary)  # type: ignore[assignment]

    def blocks(self) -> list[nn.Module]:
        return self.stage.blocks()

    def hidden(self, batch: Batch, state: State | None = None) -> Output:
        x, found = self.embedding(batch.input_ids), []  # type: ignore[var-annotated]
        if state is None:
            doc_ids = None if batch.whole_rows else batch.doc_ids
            real = batch.real
            return self._output(self.stage(x, real, doc_ids, None, found), found)
        real = state.places(*batch.shape, batch.doc_ids, batch.segments).real
        x, order = compact(x, real, x.shape[1])
        y = self.stage(x, real.gather(1, order), None, iter(state.layers), found)
        y = torch.zeros_like(y).scatter(1, order[..., None].expand_as(y), y)
        return Output(hidden=y, state=state)

    def _output(self, hidden: Tensor, found: list[tuple[Boundaries, Tensor]]) -> Output:
        out = Output(hidden=hidden)
        tokens = found[0][1].sum(1)
        total = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            for stage, (boundaries, real) in enumerate(found):
                loss = ratio_loss(boundaries, real, self.config.ratios[stage])
                total = total + (loss * tokens).sum()
                places = real.sum().clamp_min(1)
                out.stats[f"boundary_rate_{stage}"] = boundaries.chosen.sum().detach() / places
                out.stats[f"symbols_per_chunk_{stage}"] = tokens.sum() / boundaries.chosen.sum().clamp_min(1)
                out.stats[f"ratio_loss_{stage}"] = (loss.detach() * tokens).sum() / tokens.sum().clamp_min(1)
        out.losses["ratio"] = (total * self.config.ratio_weight, "tokens")
        return out

    @torch.no_grad()
    def boundaries(self, batch: Batch) -> list[Tensor]:
        """Where chunks begin, bool [B, T] for each stage; an inner stage's at the symbols that its chunks began with."""
        found: list[tuple[Boundaries, Tensor]] = []
        doc_ids = None if batch.whole_rows else batch.doc_ids
        self.stage(self.embedding(batch.input_ids), batch.real, doc_ids, None, found)
        made, places = [], torch.arange(batch.shape[1], device=batch.device).expand(batch.shape)
        for boundaries, _ in found:
            marks = torch.zeros(batch.shape, dtype=torch.bool, device=batch.device)
            marks.scatter_(1, places, boundaries.chosen)
            made.append(marks)
            places, _ = compact(places, boundaries.chosen, most_chosen(boundaries.chosen, 1.0))
        return made

    def new_state(self, batch_size: int, max_len: int, device: Any = None, dtype: Any = None) -> State:
        device, dtype = device or self.device, dtype or self.dtype
        layers = self.stage.states(batch_size, device, dtype)
        return State(torch.zeros(batch_size, dtype=torch.int64, device=device), [0] * batch_size, max_len, layers)

    def flops(self, length: int) -> int:
        """With as many chunks as the ratio loss wants; what a batch really costs depends on its text."""
        c, total, places = self.config, 0.0, float(length)
        for stage, (width, counts) in enumerate(zip(c.hidden_sizes, c.num_blocks)):
            shape = c.block_config(stage)
            block = 4 * width * shape.inner + 3 * width * shape.mlp_inner
            total += places * (sum(counts) * block + (3 * width * width if len(counts) == 3 else 0))
            places /= c.ratios[stage] if stage < len(c.ratios) else 1.0
        return round(2 * (total + length * c.hidden_sizes[0] * c.vocab_size))

    def parameter_rules(self) -> dict[str, ParameterRule]:
        c, rules = self.config, {}
        for name, _ in self.named_parameters():
            rate = _stage_rate(c, name.count("inner.")) if c.stage_learning_rates else 1.0
            convolved = "convolution" in name
            rules[name] = ParameterRule(round(rate, 6), False if convolved else None, not convolved)
        return rules

    def initial(self, name: str, parameter: Tensor) -> float | str | Tensor:
        if name == "embedding.weight":
            return 1.0
        if name.endswith("convolution.weight"):  # starts as no convolution
            return torch.nn.functional.pad(torch.ones(parameter.shape[0], 1), (0, parameter.shape[1] - 1))
        if name.endswith(("router.query.weight", "router.key.weight")):
            return torch.eye(parameter.shape[0])
        if name.endswith((".residual.weight", ".residual.bias")):
            return "zeros"
        if name.endswith("widening"):
            return self.config.initializer_range
        if parameter.dim() == 1:
            return "ones"
        std = self.config.initializer_range
        if name.endswith(("attention.out.weight", "mlp.down.weight")):
            around = sum(sum(counts) for counts in self.config.num_blocks[: name.count("inner.") + 1])
            return std / math.sqrt(2 * around)
        return std


def _stage_rate(config: HNetConfig, stage: int) -> float:
    """sqrt(4.6 prod_{i >= s} N_i / prod_i N_i D_S / D_s), N_S = 1."""
    ratios, widths = config.ratios, config.hidden_sizes
    return math.sqrt(4.6 * math.prod(ratios[stage:]) / math.prod(ratios) * widths[-1] / widths[stage])
