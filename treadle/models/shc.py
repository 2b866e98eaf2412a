"""Multi-stream transformer: n residual streams from embedding to head, mixed by per-token routers (layers/streams.py)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from treadle.data.batch import Batch
from treadle.layers.attention import Attention
from treadle.layers.context import Context
from treadle.layers.latent import LatentAttention
from treadle.layers.mlp import SwiGLU
from treadle.layers.norm import RMSNorm
from treadle.layers.rope import rotation
from treadle.layers.state import State
from treadle.layers.streams import GAIN, Routed, Router, composite, statistics
from treadle.models.backbone import Backbone
from treadle.models.base import ParameterRule
from treadle.models.decoder import DecoderConfig
from treadle.settings import option


class SHCConfig(DecoderConfig):
    """The multi-stream transformer's keys."""

    num_streams: int = option(4, aliases=("n_streams", "expansion_rate"), ge=1, le=8)
    """Residual streams n; 1 is a plain transformer."""

    routing: Literal["cayley_lie", "cayley_mixture", "sinkhorn", "birkhoff", "none"] = option("cayley_lie")
    """How streams are mixed: orthogonal per token (cayley_lie), a mixture of rotations that contracts (cayley_mixture),
    doubly stochastic (sinkhorn: mHC; birkhoff: mHC-lite), or not at all."""

    routing_components: int = option(2, aliases=("num_components",), ge=1)
    """Rotations that a token mixes (the cayley routings)."""

    router_input: Literal["streams", "mean"] = option("streams")
    """What a router sees: all streams side by side, or their mean (a quarter of the weights and cheaper)."""

    adaptive_rank: bool = option(False)
    """Each token chooses how many streams it reads and writes."""

    rank_noise: float = option(1.0, ge=0.0)
    """Scale of the Gumbel noise on that choice while training; 0 takes the likeliest."""

    stream_reduction: Literal["mean", "learned"] = option("mean")
    """How streams become one before the final norm: their mean, or learned convex weights."""

    latent_size: int | None = option(None, aliases=("kv_rank", "kv_lora_rank"), ge=1)
    """Numbers a token leaves in the decoding cache; keys and values are computed from them (default: they are kept)."""

    @model_validator(mode="after")
    def _streams_fit(self) -> SHCConfig:
        if self.routing == "birkhoff" and self.num_streams > 5:
            raise ValueError(f"routing = birkhoff mixes n! permutations; num_streams = {self.num_streams} is too many, use 5 "
                             "or fewer")  # fmt: skip
        if self.latent_size is not None and self.qk_norm:
            raise ValueError("latent_size and qk_norm exclude one another; leave one of the two out")
        return self

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        def shape(width: int, layers: int, heads: int, inner: int) -> dict[str, Any]:
            return {"vocab_size": 32000, "hidden_size": width, "num_layers": layers, "num_heads": heads,
                    "intermediate_size": inner, "tie_embeddings": True}  # fmt: skip

        return {"500m": shape(1024, 24, 16, 4864), "1b": shape(2048, 24, 16, 4096), "3b": shape(2560, 32, 32, 8704),
                "7b": shape(4096, 32, 32, 11008)}  # fmt: skip

    @classmethod
    def preset_sizes(cls) -> dict[str, float]:
        """What each preset's name stands for, in parameters (asserted by a test to 10%)."""
        return {"500m": 0.5e9, "1b": 1.07e9, "3b": 3.06e9, "7b": 6.61e9}

    @classmethod
    def recommended(cls, preset: str | None) -> dict[str, Any]:
        large = (preset or "").lower() == "7b"
        if preset is None or preset.lower() not in cls.presets():
            return {}
        return {"data.seq_len": 4096, "optim.learning_rate": 1.5e-4 if large else 3e-4,
                "train.global_batch_size": 512 if large else 1024, "optim.warmup_steps": 4000 if large else 2000,
                "optim.weight_decay": 0.1}  # fmt: skip


class Block(nn.Module):
    """Two halves (mixer, MLP), each read from and written to the streams by its own router."""

    def __init__(self, config: SHCConfig, mixer: nn.Module) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention_norm = RMSNorm(width, config.norm_eps)
        self.attention = mixer
        self.mlp_norm = RMSNorm(width, config.norm_eps)
        self.mlp = SwiGLU(width, config.inner)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        several = config.num_streams > 1
        self.attention_router = _router(config) if several else None
        self.mlp_router = _router(config) if several else None

    def forward(self, x: Tensor, context: Context, memory: Any = None) -> Tensor:
        """x [B, T, n, D] -> the same shape, n streams; [B, T, D] in a block without routers."""
        if context.token_mixer_only:
            return self.attention(x, context)
        if self.attention_router is None or self.mlp_router is None:
            x = x + self.dropout(self.attention(self.attention_norm(x), context, memory))
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        reading = self.attention_router(x, context.routed)
        x = reading.write(self.dropout(self.attention(self.attention_norm(reading.u), context, memory)))
        reading = self.mlp_router(x, context.routed)
        return reading.write(self.dropout(self.mlp(self.mlp_norm(reading.u))))


def _router(config: SHCConfig) -> Router:
    return Router(config.hidden_size, config.num_streams, config.routing, config.routing_components, config.router_input,
                  config.adaptive_rank, config.rank_noise, config.norm_eps)  # fmt: skip


class SHC(Backbone):
    """Transformer with persistent residual streams: hyper-connections (arXiv 2409.19606) with bounded mixing."""

    arch = "shc"
    Config = SHCConfig
    config: SHCConfig

    def __init__(self, config: SHCConfig) -> None:
        self._record: list[Routed] | None = None
        norm = RMSNorm(config.hidden_size, config.norm_eps)
        super().__init__(config, config.hidden_size, config.num_layers, norm, config.tie_embeddings)
        n, width = config.num_streams, config.hidden_size
        self.stream_scale = nn.Parameter(torch.zeros(n, width)) if n > 1 else None
        self.stream_shift = nn.Parameter(torch.zeros(n, width)) if n > 1 else None
        learned = n > 1 and config.stream_reduction == "learned"
        self.stream_weights = nn.Parameter(torch.zeros(n)) if learned else None

    def make_mixer(self) -> nn.Module:
        """The token mixer of a block; called as mixer(x, context, layer_state)."""
        config = self.config
        if config.latent_size is not None:
            return LatentAttention(config.hidden_size, config.num_heads, config.groups, config.width_of_head,
                                   config.latent_size, config.rope_theta)  # fmt: skip
        return Attention(config.hidden_size, config.num_heads, config.groups, config.width_of_head,
                         qk_norm=config.qk_norm, eps=config.norm_eps)  # fmt: skip

    def make_block(self, index: int) -> nn.Module:
        return Block(self.config, self.make_mixer())

    def context(self, batch: Batch, state: State | None) -> Context:
        context = super().context(batch, state)
        positions = context.token_positions.position_ids if context.token_positions is not None else batch.position_ids
        assert positions is not None
        context.rotary = rotation(positions, self.config.width_of_head, self.config.rope_theta)
        context.routed = self._record
        return context

    def embed(self, batch: Batch, context: Context) -> Tensor:
        """The n streams [B, T, n, D], each begun from the embedding in a way of its own; [B, T, D] without streams."""
        x = super().embed(batch, context)
        if self.stream_scale is None or self.stream_shift is None:
            return x
        return x[:, :, None] * (1.0 + self.stream_scale) + self.stream_shift  # [B, T, n, D]

    def final_norm(self, x: Tensor) -> Tensor:
        if self.stream_scale is None:
            return self.norm(x)
        if self.stream_weights is None:
            return self.norm(x.mean(2))
        return self.norm(self.stream_weights.softmax(0) @ x)

    def full_precision_modules(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, Router) and module.routing != "none"]

    def layer_state(self, index: int, batch_size: int, max_len: int, device: Any, dtype: Any) -> Any:
        return self.layers[index].attention.new_state(batch_size, max_len, device, dtype)  # type: ignore[operator, union-attr]

    # ---- looking at the routing ----

    def routing_stats(self, batch: Batch | None = None) -> dict[str, Any]:
        """What the routers do with a batch (default: an example of random tokens): "sublayers", a list of statistics in
        depth order (layers/streams.py), and "composite_max", "composite_min", the gain of the residual path over the whole
        depth. Leaves mode, gradients and the random state alone."""
        if self.config.num_streams == 1 or self.config.routing == "none":
            return {"sublayers": [], "composite_max": 1.0, "composite_min": 1.0}
        batch = batch if batch is not None else self.example(self.config).to(self.device)
        devices = [self.device.index or 0] if self.device.type == "cuda" else []
        self._record = []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                self.hidden(batch)
            largest, smallest = composite(self._record)
            return {"sublayers": statistics(self._record), "composite_max": largest, "composite_min": smallest}
        finally:
            self._record = None

    def inspect(self, batch: Batch) -> dict[str, float]:
        found = self.routing_stats(batch)
        rows = found["sublayers"]
        if not rows:
            return {}
        extreme = {"sigma_max": max, "sigma_min": min}
        named = {
            f"routing_{key}": extreme[key](row[key] for row in rows)
            if key in extreme
            else sum(row[key] for row in rows) / len(rows)
            for key in rows[0]
        }
        return {**named, "routing_composite_max": found["composite_max"], "routing_composite_min": found["composite_min"]}

    # ---- facts ----

    def flops(self, length: int) -> int:
        c = self.config
        mlp = 3 * 2 * c.hidden_size * c.inner
        routers = sum(module.flops(c.hidden_size) for module in self.modules() if isinstance(module, Router))
        token = c.num_layers * mlp + 2 * c.hidden_size * c.vocab_size + routers
        return length * token + c.num_layers * self.layers[0].attention.flops(length)  # type: ignore[operator, union-attr]

    def parameter_rules(self) -> dict[str, Any]:
        # Zero is no goal for rotations and for what tells the streams apart; a router's rows are decisions, not a map.
        plain = ("generators", "stream_scale", "stream_shift")
        rules = {n: ParameterRule(matrix=False) for n, _ in self.named_parameters() if n.endswith("router.weight")}
        decayless = ParameterRule(weight_decay=False, matrix=False)
        return {**rules, **{n: decayless for n, _ in self.named_parameters() if n.endswith(plain)}}

    def initial(self, name: str, parameter: Tensor) -> float | str | Tensor:
        if name.endswith("router.gain"):
            return torch.full(parameter.shape, GAIN)
        if name.endswith(("router.bias", "stream_weights")):
            return "zeros"
        if name.endswith(("generators", "stream_scale", "stream_shift")):
            return 0.01  # nearly the plain residual; enough to tell streams and rotations apart
        if parameter.dim() == 1:
            return "ones"
        std = self.config.initializer_range
        into_stream = name.endswith(("attention.out.weight", "mlp.down.weight"))
        return std / (2 * self.config.num_layers) ** 0.5 if into_stream else std
