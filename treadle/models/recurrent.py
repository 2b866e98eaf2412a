"""The block of the byte models and its keys: a recurrence (or windowed attention, or a state-space mixer) and a gated MLP."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from treadle.layers.context import Context
from treadle.layers.hgrn import HGRN, GatedMLP
from treadle.layers.reproducible import ReproducibleRMSNorm, reproducible_sigmoid
from treadle.layers.sliding_window_attention import SlidingWindowAttention
from treadle.layers.ssm import SSMMixer
from treadle.layers.weight_cache import ModuleWithWeightCache
from treadle.models.base import LanguageModelConfig, ParameterRule
from treadle.ops.recurrent_block import PackedBlock, available
from treadle.settings import option

Mixer = Literal["hgrn_bit", "hgrn", "attention", "ssm"]


class RecurrentConfig(LanguageModelConfig):
    """Keys of the recurrence and of the MLP beside it."""

    ternary: bool = option(True)
    """Matrices of -1, 0 and 1. Off: the same model with ordinary fp32 matrices, for comparison."""

    num_heads: int = option(1, aliases=("n_heads", "heads"), ge=1)
    """Parts that the norm of a recurrence's output is split into."""

    expand_ratio: int = option(1, ge=1)
    """Width of the recurrence: this times the block's width."""

    hidden_ratio: int = option(4, ge=1)
    """Width of the MLP: this times the block's width (mlp_width = full)."""

    mlp_width: Literal["full", "matmulfree"] = option("full")
    """full: hidden_ratio D; matmulfree: two thirds of it, rounded up to a multiple of 256."""

    output_gate: Literal["matmulfree", "hgrn"] = option("matmulfree")
    """What is normalised and what gates: norm(G x) silu(h), or norm(h) silu(G x)."""

    convolution_size: int = option(0, aliases=("conv_size",), ge=0, le=16)
    """Positions that a short convolution before the gates sees; 0 is none, 4 is usual."""

    shared_convolution: bool = option(False, aliases=("share_conv_kernel",))
    """One convolution of the block's input instead of one for each gate."""

    scan_backend: Literal["auto", "native", "loop", "triton"] = option(
        "auto", aliases=("attn_mode",), spellings={"fused_recurrent": "triton", "chunk": "auto"}
    )
    """How the recurrence is computed; all ways agree."""

    norm_eps: float = option(1e-6, aliases=("rms_norm_eps",), gt=0)
    """Added inside the norms' square roots."""

    initializer_range: float = option(0.02, aliases=("init_std",), gt=0)
    """Standard deviation of initial weights; projections into a stream are divided by the root of the blocks around."""

    max_position_embeddings: int | None = option(None, ge=2)
    """The length of training rows where data.seq_len is not given; a recurrence itself has no longest row."""

    def implied(self) -> dict[str, Any]:
        longest = {"data.seq_len": self.max_position_embeddings} if self.max_position_embeddings is not None else {}
        return {"tokenizer.name": "byte", **longest}

    def inner(self, width: int) -> int:
        """Width of the recurrence in a block of this width."""
        return width * self.expand_ratio

    def mlp_inner(self, width: int) -> int:
        """Width inside the MLP: `hidden_ratio` times its own, or two thirds of that in multiples of 256."""
        wide = self.hidden_ratio * width
        return wide if self.mlp_width == "full" else 256 * -(-(2 * wide) // (3 * 256))

    def check_widths(self, *widths: int) -> None:
        """ValueError where the recurrence does not fit into blocks of these widths."""
        for width in widths:
            if self.inner(width) % self.num_heads:
                raise ValueError(f"the recurrence is {self.inner(width)} wide, which does not divide by num_heads = "
                                 f"{self.num_heads}")  # fmt: skip
        if self.convolution_size == 1:
            raise ValueError("convolution_size = 1 sees one position alone; use 0 for none, or 4")


FEW_POSITIONS = 16  # one after the other through the compiled block; more are faster in products of matrices


class Block(ModuleWithWeightCache):
    """x += mixer(norm x); x += MLP(norm x). `mixer` hgrn_bit is ternary with its MLP; the others are full precision, and
    `reproducible` where other blocks of the model round (layers/reproducible.py)."""

    def __init__(
        self, config: RecurrentConfig, width: int, mixer: Mixer, *, bounded: bool = False, reproducible: bool = False, window: int = 0,
        heads: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        ternary, inner = mixer == "hgrn_bit", config.inner(width)
        self.attention_norm = ReproducibleRMSNorm(width, config.norm_eps)
        self.attention: nn.Module
        if mixer == "attention":
            self.attention = SlidingWindowAttention(width, heads, window=window, reproducible=reproducible)
        elif mixer == "ssm":
            self.attention = SSMMixer(width, heads, heads, width // heads, window=0, features="hedgehog", normalizer=True,
                                      eps=config.norm_eps, reproducible=reproducible)  # fmt: skip
        else:
            self.attention = HGRN(
                width, inner, heads=config.num_heads, ternary=ternary, gate=config.output_gate, reproducible=reproducible,
                convolution=config.convolution_size, shared_convolution=config.shared_convolution, eps=config.norm_eps,
                backend=config.scan_backend,
            )  # fmt: skip
        self.mlp_norm = ReproducibleRMSNorm(width, config.norm_eps)
        self.mlp = GatedMLP(width, config.mlp_inner(width), ternary, reproducible)
        self.lower_bound = nn.Parameter(torch.zeros(inner)) if bounded else None
        self.eps, self.fusable = config.norm_eps, ternary and not config.convolution_size
        self._sources: list[tuple[Any, str]] | None = None  # where its parameters are, so that new ones are seen at once

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_sources": None}  # a copy has parameters of its own

    @property
    def bound(self) -> Tensor | None:
        """The least share of its state that each channel keeps, [D'] in [0, 1]; None for a block without lower bounds."""
        return reproducible_sigmoid(self.lower_bound.float()) if self.lower_bound is not None else None

    def forward(self, x: Tensor, context: Context, state: Any = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; with a state, x continues the tokens it holds."""
        if state is not None and x.shape[1] <= FEW_POSITIONS and not torch.is_grad_enabled() and not self.training:
            packed = self.packed(x)
            if packed is not None:
                assert context.token_positions is not None
                token_mask = context.token_positions.token_mask
                if x.shape[1] == 1:
                    return packed(x.float(), state.hidden, token_mask)
                steps = zip(x.split(1, 1), token_mask.split(1, 1))
                return torch.cat([packed(one.float(), state.hidden, mask) for one, mask in steps], 1)
        if torch.is_grad_enabled():
            self.clear_weight_cache()
        bound = () if self.lower_bound is None else (self.bound,)
        if context.token_mixer_only:
            return self.attention(x, context, None, *bound)
        x = x + self.attention(self.attention_norm(x), context, state, *bound)
        return x + self.mlp(self.mlp_norm(x))

    def new_state(self, rows: int, max_len: int, device: Any, dtype: Any) -> Any:
        """The decoding state before the first position."""
        return self.attention.new_state(rows, max_len, device, dtype)  # type: ignore[operator]

    def flops(self, length: int) -> int:
        """Of the products of one row's forward pass."""
        return self.attention.flops(length) + self.mlp.flops(length)  # type: ignore[operator]

    def packed(self, x: Tensor) -> PackedBlock | None:
        """The block as one compiled call for one position at a time, where there is one. x [B, T, D]."""
        if not self.fusable or x.device.type != "cpu" or not available():
            return None
        if self._sources is None:
            holders = (*self._layers(), self.attention_norm, self.mlp_norm, self.attention, self)
            self._sources = [(h._parameters, name) for h in holders for name, p in h._parameters.items() if p is not None]
        parameters = [held[name] for held, name in self._sources]
        try:
            mark = [p._version for p in parameters] + [p.data_ptr() for p in parameters]
        except RuntimeError:  # gathered from shards
            return None
        return self.cached(mark, lambda: self._pack(parameters))

    def _pack(self, parameters: list[Any]) -> PackedBlock | None:
        if any(type(p.data) is not Tensor for p in parameters):  # in parts, on several processes
            return None
        mixer: HGRN = self.attention  # type: ignore[assignment]
        return PackedBlock(
            [layer.packed() for layer in self._layers()], self.attention_norm.weight, self.mlp_norm.weight, mixer.norm,  # type: ignore[operator]
            self.bound, eps=self.eps, heads=mixer.heads, norm_of_hidden=mixer.gate == "hgrn",
        )  # fmt: skip

    def _layers(self) -> tuple[nn.Module, ...]:
        mixer, mlp = self.attention, self.mlp
        return mixer.forget, mixer.input, mixer.output_gate, mixer.out, mlp.gate_up, mlp.down  # type: ignore[return-value]


INTO_STREAM = ("attention.out.weight", "mlp.down.weight")


def block_initial(name: str, parameter: Tensor) -> Tensor | str | None:
    """How a block's special parameters start; None for matrices. Of any shape."""
    if name.endswith("convolution.weight"):  # starts as no convolution
        return torch.nn.functional.pad(torch.ones(parameter.shape[0], 1), (0, parameter.shape[1] - 1))
    if (own := SSMMixer.initial(name, parameter)) is not None:
        return own
    if name.endswith(".bias"):
        return "zeros"
    return "ones" if parameter.dim() == 1 else None


def block_rule(name: str) -> ParameterRule:
    """How the optimiser treats a block's parameters beyond the default."""
    if "convolution" in name:
        return ParameterRule(weight_decay=False, matrix=False)
    return ParameterRule(weight_decay=False if name.endswith(("_features", "decay.weight")) else None)
