"""What mixes positions in a block: the contract of all such layers, and their names (`layer_types` of a model)."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from treadle import trusted_code
from treadle.errors import ConfigError
from treadle.layers.context import Context
from treadle.layers.state import LayerState
from treadle.registry import Registry

TOKEN_MIXERS = Registry(
    "layer type",
    {
        "full_attention": "treadle.layers.attention:Attention",
        "sliding_attention": "treadle.layers.attention:SlidingAttention",
        "block_sparse_attention": "treadle.layers.mixers.block_sparse_attention:BlockSparseAttention",
        "linear_attention": "treadle.layers.mixers.linear_attention:LinearAttention",
        "ssd": "treadle.layers.mixers.ssd:SSD",
        "hgrn": "treadle.layers.mixers.hgrn:HGRNMixer",
        "retnet": "treadle.layers.mixers.retnet:RetNet",
        "rwkv": "treadle.layers.mixers.rwkv:RWKV",
        "gated_deltanet": "treadle.layers.mixers.gated_deltanet:GatedDeltaNet",
    },
    aliases={
        **dict.fromkeys(("attention", "full", "softmax"), "full_attention"),
        **dict.fromkeys(("sliding_window", "sliding_window_attention", "local", "local_attention"), "sliding_attention"),
        **dict.fromkeys(("block_sparse", "sparse", "sparse_attention"), "block_sparse_attention"),
        **dict.fromkeys(("linear", "linear_transformer"), "linear_attention"),
        **dict.fromkeys(("mamba2", "mamba_2"), "ssd"),
        **dict.fromkeys(("retention", "ret_net"), "retnet"),
        **dict.fromkeys(("rwkv6", "rwkv_6"), "rwkv"),
        **dict.fromkeys(("deltanet", "gated_delta_net", "gdn"), "gated_deltanet"),
    },
    base="treadle.layers.token_mixers:TokenMixer",
)


class TokenMixer(nn.Module):
    """Base of every token mixer: x [B, T, D] -> [B, T, D], position t from positions up to t of its own document
    (context.doc_ids). With a state (context.token_positions is set) positions go on from it, each row is one document, and
    padding leaves its row's state as it was.

    read_in_place: its linear layers whose weights it reads instead of calling them; dropout of adapters does not reach these."""

    read_in_place: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Any, layer: int) -> TokenMixer:
        """The mixer of block number `layer` in a model with these keys."""
        raise NotImplementedError(f"{cls.__name__} is made by its model alone")

    @abstractmethod
    def forward(self, x: Tensor, context: Context, state: Any = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; with a state, x continues the tokens it holds."""

    @abstractmethod
    def new_state(self, rows: int, max_len: int, device: Any, dtype: Any) -> LayerState:
        """Its decoding state before the first position."""

    @abstractmethod
    def flops(self, length: int) -> int:
        """Floating-point operations of one row's forward pass: 2 a multiply-add."""

    @classmethod
    def initial(cls, name: str, parameter: Tensor) -> float | str | Tensor | None:
        """How one of its parameters starts (Model.initial); None: as any matrix or vector of the model."""
        return None

    @classmethod
    def undecayed(cls, name: str) -> bool:
        """Whether a matrix of this name is spared weight decay (vectors always are)."""
        return False

    @classmethod
    def elementwise(cls, name: str) -> bool:
        """Whether a matrix of this name multiplies element by element (a short convolution): spared weight decay, and no
        matrix to Muon."""
        return False


NEEDED = ("from_config(config, layer)", "forward(x, context, state=None)", "new_state(rows, max_len, device, dtype)", "flops(length)")


def check_own(names: Sequence[str]) -> None:
    """ConfigError where a mixer of somebody's own (FILE.py:CLASS) lacks what a model, decoding or a comparison asks of it."""
    for name in dict.fromkeys(filter(trusted_code.is_place, names)):
        cls = TOKEN_MIXERS.get(name)
        own = {part for kind in cls.__mro__[: cls.__mro__.index(TokenMixer)] for part in vars(kind)}
        lacking = [method for method in NEEDED if method.partition("(")[0] not in own]
        if not lacking and len(inspect.signature(cls.forward).parameters) < len(inspect.signature(TokenMixer.forward).parameters):
            lacking = [NEEDED[1]]
        if lacking:
            raise ConfigError(f"the token mixer {name} lacks {', '.join(lacking)}; docs/extending.md has a whole one")


def layer_types_of(pattern: Sequence[str] | None, count: int) -> list[str]:
    """The canonical name of each block's mixer; a shorter pattern is repeated. ValueError for one that does not fit.
    ConfigError for unknown names."""
    if pattern is None:
        return ["full_attention"] * count
    if not pattern or len(pattern) > count:
        raise ValueError(f"layer_types names {len(pattern)} layers, and num_layers = {count}; give one name a layer, or a shorter "
                         "pattern, which is repeated")  # fmt: skip
    names = [TOKEN_MIXERS.canonical(name) for name in pattern]
    return [names[index % len(names)] for index in range(count)]
