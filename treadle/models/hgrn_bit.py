"""The flat ternary recurrence over bytes: every matrix product of the model has weights of -1, 0 and 1."""

from __future__ import annotations

import operator
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from treadle.layers.attention import Context
from treadle.layers.exact import ExactRMSNorm, evenly
from treadle.layers.hgrn import HGRN, GatedMLP, RecurrentState, linear
from treadle.models.backbone import Backbone
from treadle.models.base import Capabilities, ModelConfig, ParameterRule
from treadle.ops.recurrent_block import PackedBlock, available
from treadle.settings import option


class HGRNBitConfig(ModelConfig):
    """The ternary recurrence's keys."""

    hidden_size: int = option(256, aliases=("d_model", "dim"), ge=1)
    """Width D of the residual stream."""

    num_layers: int = option(6, aliases=("n_layers", "num_hidden_layers", "layers"), ge=1)
    """Number of blocks."""

    num_heads: int = option(1, aliases=("n_heads", "heads"), ge=1)
    """Parts that the norm of a recurrence's output is split into."""

    expand_ratio: int = option(1, ge=1)
    """Width of the recurrence: this times D."""

    hidden_ratio: int = option(4, ge=1)
    """Width of the MLP: this times D (mlp_width = full)."""

    mlp_width: Literal["full", "matmulfree"] = option("full")
    """full: hidden_ratio D; matmulfree: two thirds of it, rounded up to a multiple of 256."""

    ternary: bool = option(True)
    """Off: the same model with ordinary fp32 matrices, for comparison."""

    output_gate: Literal["matmulfree", "hgrn"] = option("matmulfree")
    """What is normed and what gates: norm(G x) silu(h), or norm(h) silu(G x)."""

    lower_bound: bool = option(False, aliases=("use_lower_bound",))
    """Deeper blocks forget less: a learned bound on their gates that grows with depth."""

    convolution_size: int = option(0, aliases=("conv_size",), ge=0, le=16)
    """Places that a short convolution before the gates sees; 0 is none, 4 is usual."""

    shared_convolution: bool = option(False, aliases=("share_conv_kernel",))
    """One convolution of the block's input instead of one for each gate."""

    scan_backend: Literal["auto", "native", "loop", "triton"] = option(
        "auto", aliases=("attn_mode",), spellings={"fused_recurrent": "triton", "chunk": "auto"}
    )
    """How the recurrence is computed; all ways agree."""

    tie_embeddings: bool = option(False, aliases=("tie_word_embeddings",))
    """The head shares the embedding's weights (not with ternary: the head's are rounded)."""

    norm_eps: float = option(1e-6, aliases=("rms_norm_eps",), gt=0)
    """Added inside the norms' square roots."""

    initializer_range: float = option(0.02, aliases=("init_std",), gt=0)
    """Standard deviation of initial weights; projections into the residual stream start at 1/sqrt(2 layers) of it."""

    @model_validator(mode="after")
    def _shapes(self) -> HGRNBitConfig:
        if self.inner % self.num_heads:
            raise ValueError(f"the recurrence is {self.inner} wide, which does not divide by num_heads = {self.num_heads}")
        if self.convolution_size == 1:
            raise ValueError("convolution_size = 1 sees one place alone; use 0 for none, or 4")
        if self.ternary and self.tie_embeddings:
            raise ValueError("tie_embeddings with ternary would round the embedding; leave it out, or use --ternary false")
        return self

    @property
    def inner(self) -> int:
        return self.hidden_size * self.expand_ratio

    @property
    def mlp_inner(self) -> int:
        wide = self.hidden_ratio * self.hidden_size
        return wide if self.mlp_width == "full" else 256 * -(-(2 * wide) // (3 * 256))

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        return {"slm_base": {"vocab_size": 256, "hidden_size": 512, "num_layers": 6}}

    @classmethod
    def preset_sizes(cls) -> dict[str, float]:
        """Parameters of each preset, exactly."""
        return {"slm_base": 25_465_856}

    @classmethod
    def recommended(cls, preset: str | None) -> dict[str, Any]:
        if (preset or "").lower().replace("-", "_") != "slm_base":
            return {}
        return {"optim.learning_rate": 3e-4, "tokenizer.name": "byte", "train.per_device_train_batch_size": 32}


_version, _address = operator.attrgetter("_version"), Tensor.data_ptr


class Block(nn.Module):
    """x += HGRN(norm x); x += MLP(norm x)."""

    def __init__(self, config: HGRNBitConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention_norm = ExactRMSNorm(width, config.norm_eps)
        self.attention = HGRN(
            width, config.inner, heads=config.num_heads, ternary=config.ternary, gate=config.output_gate,
            convolution=config.convolution_size, shared_convolution=config.shared_convolution, eps=config.norm_eps,
            backend=config.scan_backend,
        )  # fmt: skip
        self.mlp_norm = ExactRMSNorm(width, config.norm_eps)
        self.mlp = GatedMLP(width, config.mlp_inner, config.ternary)
        self.lower_bound = nn.Parameter(torch.zeros(config.inner)) if config.lower_bound else None
        self.eps, self.fusable = config.norm_eps, config.ternary and not config.convolution_size
        self._kept: tuple[Any, PackedBlock] | None = None
        self._sources: list[tuple[Any, str]] | None = None  # where its parameters are, so that new ones are seen at once

    @property
    def bound(self) -> Tensor | None:
        return evenly(torch.sigmoid, self.lower_bound.float()) if self.lower_bound is not None else None

    def forward(self, x: Tensor, context: Context, state: RecurrentState | None = None) -> Tensor:
        if state is not None and x.shape[1] == 1 and not torch.is_grad_enabled() and not self.training:
            packed = self.packed(x)
            if packed is not None:
                assert context.places is not None
                return packed(x.float(), state.hidden, context.places.real)
        bound = self.bound
        if context.mixer_only:
            return self.attention(x, context, None, bound)
        x = x + self.attention(self.attention_norm(x), context, state, bound)
        return x + self.mlp(self.mlp_norm(x))

    def packed(self, x: Tensor) -> PackedBlock | None:
        """The block as one compiled call for a place at a time, where there is one."""
        if not self.fusable or x.device.type != "cpu" or not available():
            return None
        if self._sources is None:
            self._sources = [(module._parameters, name) for module in (*self._layers(), self.attention_norm, self.mlp_norm, self.attention, self)
                             for name, found in module._parameters.items() if found is not None]  # fmt: skip
        mark = [f(p[name]) for p, name in self._sources for f in (_version, _address)]
        if self._kept is None or self._kept[0] != mark:
            packed = [layer.packed() for layer in self._layers()]  # type: ignore[operator]
            vectors = (self.attention_norm.weight, self.mlp_norm.weight, self.attention.norm, self.bound)
            self._kept = mark, PackedBlock(packed, *vectors, eps=self.eps, heads=self.attention.heads,
                                           norm_of_hidden=self.attention.gate == "hgrn")  # fmt: skip
        return self._kept[1]

    def _layers(self) -> tuple[nn.Module, ...]:
        mixer, mlp = self.attention, self.mlp
        return mixer.forget, mixer.input, mixer.output_gate, mixer.out, mlp.gate_up, mlp.down


class HGRNBit(Backbone):
    """Ternary gated linear recurrence over bytes (MatMul-free LM, arXiv 2406.02528); decoding state of constant size."""

    arch = "hgrn_bit"
    Config = HGRNBitConfig
    config: HGRNBitConfig

    def __init__(self, config: HGRNBitConfig) -> None:
        norm = ExactRMSNorm(config.hidden_size, config.norm_eps)
        super().__init__(config, config.hidden_size, config.num_layers, norm, config.tie_embeddings)
        if config.ternary:
            self.capabilities = Capabilities(rounds=True)
            self.head = linear(config.hidden_size, config.vocab_size, True)  # type: ignore[assignment]

    def make_block(self, index: int) -> nn.Module:
        return Block(self.config)

    def layer_state(self, index: int, batch_size: int, max_len: int, device: Any, dtype: Any) -> RecurrentState:
        return self.layers[index].attention.empty(batch_size, device, dtype)  # type: ignore[union-attr, operator]

    def flops(self, length: int) -> int:
        c = self.config
        block = 4 * c.hidden_size * c.inner + 3 * c.hidden_size * c.mlp_inner
        return 2 * length * (c.num_layers * block + c.hidden_size * c.vocab_size)

    def parameter_rules(self) -> dict[str, ParameterRule]:
        rule = ParameterRule(weight_decay=False, matrix=False)
        return {n: rule for n, _ in self.named_parameters() if "convolution" in n}

    def initial(self, name: str, parameter: Tensor) -> float | str | Tensor:
        if name.endswith("convolution.weight"):  # starts as no convolution
            return torch.nn.functional.pad(torch.ones(parameter.shape[0], 1), (0, parameter.shape[1] - 1))
        if name.endswith("lower_bound"):  # from forgetting freely to a memory of 50 places, by depth
            depth = int(name.split(".")[1]) / max(1, self.config.num_layers - 1)
            return torch.full(parameter.shape, -4.0 + 8.0 * depth)
        if parameter.dim() == 1:
            return "ones"
        std = self.config.initializer_range
        into_stream = name.endswith(("attention.out.weight", "mlp.down.weight"))
        return std / (2 * self.config.num_layers) ** 0.5 if into_stream else std
