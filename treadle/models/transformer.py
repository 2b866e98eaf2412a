"""The dense transformer: Llama style (RMSNorm, rotary positions, SwiGLU) and GPT-2 style (LayerNorm, learned positions,
GELU, biases) from one file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import model_validator
from torch import Tensor, nn

from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.layers.context import Context
from treadle.layers.dynamics import INLDynamics, Steered, statistics
from treadle.layers.head import SoftcappedHead
from treadle.layers.mlp import MLP, SwiGLU
from treadle.layers.norm import keeping, make_norm, of_sum
from treadle.layers.rope import rotation, scaled_rotation
from treadle.layers.state import State
from treadle.layers.token_mixers import TOKEN_MIXERS, TokenMixer, check_own, layer_types_of
from treadle.layers.token_shift import TokenShift
from treadle.models.backbone import Backbone
from treadle.models.base import ParameterRule
from treadle.models.dense_keys import DenseConfig
from treadle.models.dynamics_keys import DynamicsKeys
from treadle.models.mixer_keys import MixerKeys
from treadle.ops.residual import residual_sum
from treadle.settings import option


class TransformerConfig(DynamicsKeys, MixerKeys, DenseConfig):
    """The dense transformer's keys."""

    layer_types: list[str] | None = option(None, aliases=("layer_pattern",))
    """The token mixer of each block, as in ["ssd", "ssd", "ssd", "attention"]; a shorter list is repeated. Default: full
    attention everywhere."""

    max_position_embeddings: int = option(2048, aliases=("max_seq_len", "block_size", "n_positions"), ge=2)
    """Rows of the learned position table (gpt2); the longest row a generation may reach."""

    attention_dropout: float = option(0.0, aliases=("attn_pdrop",), ge=0.0, lt=1.0)
    """Share of attention weights dropped while training (takes the slower masked path)."""

    @model_validator(mode="before")
    @classmethod
    def _style_of_activation(cls, keys: Any) -> Any:
        if isinstance(keys, dict) and "style" not in keys and keys.get("activation") in ("gelu", "gelu_tanh", "relu"):
            return {**keys, "style": "gpt2"}
        if isinstance(keys, dict) and keys.get("activation") == "relu2":
            return {"mlp": "relu2", **keys}
        return keys

    @model_validator(mode="after")
    def _mixers_are_known(self) -> TransformerConfig:
        types = layer_types_of(self.layer_types, self.num_layers)
        if "sliding_attention" in types and self.sliding_window is None:
            raise ValueError("layer_types has sliding_attention, which needs sliding_window: the positions that a query sees")
        self.check_mixers(types)
        check_own(types)
        return self

    def mixer(self, layer: int) -> type[TokenMixer]:
        """The class of a block's token mixer."""
        return TOKEN_MIXERS.get(layer_types_of(self.layer_types, self.num_layers)[layer])

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        def llama(width: int, layers: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
            shape = {"hidden_size": width, "num_layers": layers, "num_heads": heads, "intermediate_size": inner}
            return {"style": "llama", "vocab_size": 32000, **shape, **more}

        def gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
            shape = {"hidden_size": width, "num_layers": layers, "num_heads": heads}
            return {"style": "gpt2", "vocab_size": 50257, "max_position_embeddings": 1024, "dropout": 0.1, **shape}

        untied = {"tie_embeddings": False, "max_position_embeddings": 4096}
        return {
            "nano": llama(320, 6, 5, 896, vocab_size=8192),
            "micro": llama(448, 9, 7, 1280, vocab_size=16384),
            "tiny": llama(768, 14, 12, 2048),
            "small": llama(1024, 25, 16, 2816),
            "medium": llama(1536, 25, 16, 4096),
            "large": llama(2048, 24, 16, 5632),
            "xl": llama(4096, 32, 32, 11008, **untied),
            "gpt2": gpt2(768, 12, 12),
            "gpt2_medium": gpt2(1024, 24, 16),
            "llama_7b": llama(4096, 32, 32, 11008, **untied),
        }

    # What each preset's name promises, in parameters (asserted by a test to 5%).
    @classmethod
    def preset_sizes(cls) -> dict[str, float]:
        """Preset -> parameters, about, as people call the sizes."""
        return {"nano": 10e6, "micro": 30e6, "tiny": 125e6, "small": 350e6, "medium": 760e6, "large": 1.3e9,
                "xl": 6.7e9, "gpt2": 124e6, "gpt2_medium": 355e6, "llama_7b": 6.74e9}  # fmt: skip

    # Of presets that were measured with it (bench/presets.py): NorMuon's learning rate. All others have AdamW's.
    normuon_rates: ClassVar[dict[str, float]] = {"nano": 8e-3}

    @classmethod
    def recommended(cls, preset: str | None) -> dict[str, Any]:
        rates = {"nano": 1e-3, "micro": 1e-3, "tiny": 6e-4, "small": 3e-4, "medium": 2.5e-4, "large": 2e-4,
                 "xl": 1.2e-4, "gpt2": 6e-4, "gpt2_medium": 3e-4, "llama_7b": 3e-4}  # fmt: skip
        name = (preset or "").lower().replace("-", "_")
        if name in cls.normuon_rates:
            return {"optim.name": "normuon", "optim.learning_rate": cls.normuon_rates[name]}
        return {"optim.learning_rate": rates[name]} if name in rates else {}


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream. With dynamics x is [B, T, 2, D]: the stream and its velocity."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        gpt2, width, inner, bias = config.style == "gpt2", config.hidden_size, config.inner, config.mlp_biases

        def norm(wanted: bool) -> nn.Module:
            return make_norm("layer" if gpt2 else "rms", width, config.norm_eps) if wanted else nn.Identity()

        self.norms_sums = not config.ends_normalised
        self.attention_norm = norm(config.pre_norm or self.norms_sums)
        self.attention = config.mixer(layer).from_config(config, layer)
        self.attention_post_norm = norm(config.post_norms)
        self.mlp_norm = norm(config.pre_norm or self.norms_sums)
        self.mlp = (SwiGLU(width, inner, bias, config.mlp_activation) if config.gated
                    else MLP(width, inner, config.mlp_activation, bias))  # fmt: skip
        self.mlp_post_norm = norm(config.post_norms)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()  # Dropout(0) still multiplies
        self.dynamics = config.make_dynamics()
        self.steers_attention = config.dynamics_placement == "attention"

    def forward(self, x: Tensor, context: Context, state: Any = None) -> Tensor:
        """x [B, T, D] -> [B, T, D], or [B, T, 2, D] with dynamics; with a state, x continues the tokens it holds."""
        if context.token_mixer_only:
            return self.attention(x, context)
        x, velocity = (x, None) if self.dynamics is None else x.unbind(2)
        x, y = (x, x) if self.norms_sums else keeping(self.attention_norm, x)
        y = self.attention_post_norm(self.attention(y, context, state))
        if self.dynamics is not None and self.steers_attention:
            y, velocity = self.dynamics(y, velocity, context.steered)
        if self.norms_sums:
            x = self.attention_norm(x + self.dropout(y))
            x = self.mlp_norm(x + self.dropout(self.mlp(x)))
        else:
            x, y = of_sum(self.mlp_norm, x, self.dropout(y))
            x = residual_sum(x, self.dropout(self.mlp_post_norm(self.mlp(y))))
        if velocity is None:
            return x
        if self.dynamics is not None and not self.steers_attention:
            x, velocity = self.dynamics(x, velocity, context.steered)
        return torch.stack((x, velocity), 2)


def _grows_with_width(name: str) -> bool:
    """A block's matrix that reads as many numbers as the model is wide, for muP."""
    return name.startswith("layers.") and not name.endswith(("value_embedding.weight", "value_gate.weight"))


class Transformer(Backbone):
    """Decoder-only transformer (Vaswani et al. 2017; Radford et al. 2019; Touvron et al. 2023)."""

    arch = "transformer"
    Config = TransformerConfig
    config: TransformerConfig

    def __init__(self, config: TransformerConfig) -> None:
        norm = make_norm("layer" if config.style == "gpt2" else "rms", config.hidden_size, config.norm_eps)
        norm = norm if config.ends_normalised else nn.Identity()
        self._steered: list[Steered] | None = None
        super().__init__(config, config.hidden_size, config.num_layers, norm, config.tie_embeddings)
        self.logit_softcap = config.final_logit_softcapping
        if self.logit_softcap is not None:
            self.head = SoftcappedHead(config.hidden_size, config.vocab_size, self.logit_softcap)
            self.tie()
        learned = config.style == "gpt2"
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.token_shift = TokenShift(config.hidden_size) if config.token_shift else None
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def make_block(self, index: int) -> nn.Module:
        return Block(self.config, index)

    def context(self, batch: Batch, state: State | None) -> Context:
        context = super().context(batch, state)
        context.steered = self._steered
        context.input_ids = batch.input_ids if self.config.value_embeddings else None
        context.previous = state.layers[-1] if state is not None and self.token_shift is not None else None
        if self.positions is None:
            c, ids = self.config, self._position_ids(batch, context)
            if c.rope_scaling is None:
                context.rotary = rotation(ids, c.rotary_width, c.rope_theta)
            else:
                context.rotary = scaled_rotation(ids, c.rotary_width, c.rope_theta, c.rope_scaling, c.max_position_embeddings)
            if c.rope_local_base_freq is not None:
                context.local_rotary = rotation(ids, c.rotary_width, c.rope_local_base_freq)
        return context

    def _position_ids(self, batch: Batch, context: Context) -> Tensor:
        if context.token_positions is not None:
            return context.token_positions.position_ids
        assert batch.position_ids is not None
        return batch.position_ids

    def embed(self, batch: Batch, context: Context) -> Tensor:
        """The residual stream before the first block, [B, T, D]; ConfigError for more positions than learned ones."""
        x = super().embed(batch, context)
        if self.config.embedding_multiplier != 1:
            x = x * self.config.embedding_multiplier
        if self.token_shift is not None:
            x = self.token_shift(x, self._position_ids(batch, context), context.token_positions, context.previous)
        if self.positions is not None:
            longest = context.used if context.token_positions is not None else batch.shape[1]
            if longest > self.config.max_position_embeddings:
                raise ConfigError(f"{longest} positions, but the model has max_position_embeddings = "
                                  f"{self.config.max_position_embeddings}; use shorter rows (--seq_len)")  # fmt: skip
            x = x + self.positions(self._position_ids(batch, context))
        x = self.dropout(x)
        return x if self.config.dynamics == "none" else torch.stack((x, torch.zeros_like(x)), 2)

    def final_norm(self, x: Tensor) -> Tensor:
        x = self.norm(x if self.config.dynamics == "none" else x[:, :, 0])
        return x if self.config.mup_base_width is None else x * self.config.width_ratio

    @property
    def longest_row(self) -> int | None:
        return self.config.max_position_embeddings if self.positions is not None else None

    def layer_state(self, index: int, batch_size: int, max_len: int, device: Any, dtype: Any) -> Any:
        return self.layers[index].attention.new_state(batch_size, max_len, device, dtype)  # type: ignore[operator, union-attr]

    def new_state(self, batch_size: int, max_len: int, device: Any = None, dtype: Any = None) -> State:
        state = super().new_state(batch_size, max_len, device, dtype)
        if self.token_shift is not None:
            state.layers.append(self.token_shift.new_state(batch_size, device or self.device, dtype or self.dtype))
        return state

    def flops(self, length: int) -> int:
        c = self.config
        mlp = c.hidden_size * c.inner * (3 if c.gated else 2)
        mixers = sum(block.attention.flops(length) for block in self.layers)  # type: ignore[operator, union-attr]
        mixers += length * sum(layer.flops() for layer in self._dynamics())
        mixers += 2 * length * self.token_shift.gate.in_features if self.token_shift is not None else 0
        return mixers + 2 * length * (c.num_layers * mlp + c.hidden_size * c.vocab_size)

    def _dynamics(self) -> list[INLDynamics]:
        return [module for module in self.modules() if isinstance(module, INLDynamics)]

    def full_precision_modules(self) -> list[nn.Module]:
        return [*super().full_precision_modules(), *self._dynamics()]

    def inspect(self, batch: Batch) -> dict[str, float]:
        """What dynamics do with a batch (layers/dynamics.py `statistics`); nothing without them."""
        if self.config.dynamics == "none":
            return {}
        self._steered, was_training = [], self.training
        self.eval()
        try:
            with torch.no_grad():
                self.hidden(batch)
            return statistics(self._steered)
        finally:
            self._steered = None
            self.train(was_training)

    def parameter_rules(self) -> dict[str, ParameterRule]:
        of_mixers = [(name, own) for name, _ in self.named_parameters() if (own := self._in_mixer(name))]
        spared = {n: ParameterRule(weight_decay=False) for n, (mixer, own) in of_mixers if mixer.undecayed(own)}
        single = {n: ParameterRule(weight_decay=False, matrix=False) for n, (mixer, own) in of_mixers if mixer.elementwise(own)}
        rules = {**super().parameter_rules(), **spared, **single}
        if self.config.mup_base_width is None:
            return rules
        inside = [n for n, p in self.named_parameters() if p.dim() == 2 and _grows_with_width(n)]
        return rules | {n: replace(rules.get(n, ParameterRule()), width_ratio=self.config.width_ratio) for n in inside}

    def _in_mixer(self, name: str) -> tuple[TokenMixer, str] | None:
        """The mixer that a parameter belongs to, and its name there."""
        block, _, rest = name.partition(".attention.")
        return (self.get_submodule(block).attention, rest) if rest else None  # type: ignore[return-value]

    def initial(self, name: str, parameter: Tensor) -> float | str | Tensor:
        inside = self._in_mixer(name)
        if inside is not None and (own := inside[0].initial(inside[1], parameter)) is not None:
            return own
        layer, _, rest = name.partition(".dynamics.")
        if rest and (own_start := self.get_submodule(f"{layer}.dynamics").initial(rest)) is not None:  # type: ignore[operator]
            return own_start
        if name.endswith(".bias") or name == "token_shift.gate.weight":
            return "zeros"
        if parameter.dim() == 1:
            return "ones"
        std = self.config.initializer_range * (self.config.width_ratio**0.5 if _grows_with_width(name) else 1.0)
        into_stream = name.endswith(("attention.out.weight", "mlp.down.weight"))
        if into_stream and self.config.zero_init_residual:
            return "zeros"
        return std / (2 * self.config.num_layers) ** 0.5 if into_stream else std
