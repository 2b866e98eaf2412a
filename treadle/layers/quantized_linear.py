"""A model for reading whose linear layers hold their weights in 16, 8 or 4 bits. The model itself stays as it is."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.layers.head import SoftcappedHead
from treadle.layers.reproducible import ReproducibleLinear
from treadle.ops.packed_linear import PackedMatrix, Quantized, native, quantize
from treadle.ops.precision import resolve

M = TypeVar("M", bound=nn.Module)

MANY_ROWS = 64  # from here on a product in bf16, where the machine multiplies bf16, costs less with its unpacking than ours
_products = threading.local()  # `rounded` there: within rounded_products
SMALLEST = 32  # inputs and outputs of a layer that is worth packing; gates and steps of a few numbers stay in fp32


@functools.cache
def multiplies_bf16() -> bool:
    """Whether products of many rows are faster in bf16 on this kind of CPU: by its features, since a timing would let the same
    seed give another text."""
    return resolve("auto", torch.device("cpu"), 1024) == "bf16"


@contextmanager
def rounded_products(rounded: bool = True) -> Iterator[None]:
    """Inside, packed layers that may round multiply in bf16 where that is faster for many rows, in this thread. Whoever enters it says so of
    whole rows of a batch, by what is the same for a row alone: how many rows a layer sees depends on its neighbours."""
    before, _products.rounded = getattr(_products, "rounded", False), rounded
    try:
        yield
    finally:
        _products.rounded = before


def may_round(model: Any) -> bool:
    """Whether a model has layers to which `rounded_products` makes a difference."""
    return any(isinstance(part, QuantizedLinear) and part.rounds for part in model.modules())


class QuantizedLinear(nn.Linear):
    """x W^T + b with W in a format of ops/packed_linear.py, without gradients; `weight` gives W in fp32, made anew each time.

    reproducible: rows keep their bits however many there are, so no other product than the packed one is taken. packed: laid
    out for the compiled product, where there is one.
    """

    def __init__(self, quantized: Quantized, bias: Tensor | None = None, reproducible: bool = False, packed: bool = True) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = quantized.shape
        self.kind, self.reproducible = quantized.kind, reproducible
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
        self.matrix: PackedMatrix | Quantized = quantized
        if packed and quantized.codes.device.type == "cpu":  # without the compiled product as fast as fp32, instead of unpacking at each use
            # A vector of its own: the layer's may be written to in place.
            self.matrix = PackedMatrix(quantized, None if bias is None else bias.detach().clone()) if native() is not None else Quantized("fp32", quantized.dequantize())

    @property
    def rounds(self) -> bool:
        """Whether products of many rows may be in bf16: where the weights are rounded anyway, and the machine is faster so."""
        return isinstance(self.matrix, PackedMatrix) and self.kind != "fp32" and not self.reproducible and multiplies_bf16()

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W [N, K] in fp32, made anew each time."""
        return self.matrix.dequantize()

    def extra_repr(self) -> str:
        """Sizes and format, for print(model)."""
        return f"{self.in_features}, {self.out_features}, {self.kind}"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's type, or autocast's where that is on."""
        flat = x.reshape(-1, x.shape[-1])
        if isinstance(self.matrix, Quantized) or torch.is_grad_enabled():
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        if getattr(_products, "rounded", False) and self.rounds:
            return self._in_bf16(flat).to(x.dtype).view(*x.shape[:-1], self.out_features)
        return self.matrix.product(flat.float()).to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _in_bf16(self, flat: Tensor) -> Tensor:
        """Many rows: both factors rounded to bf16, summed in fp32, the sum rounded to bf16."""
        y = flat.to(torch.bfloat16) @ self.weight.to(torch.bfloat16).t()
        return y if self.bias is None else y + self.bias


class QuantizedSoftcappedHead(SoftcappedHead, QuantizedLinear):
    """The same for a head whose logits are bounded."""

    def __init__(self, quantized: Quantized, softcap: float, packed: bool = True) -> None:
        QuantizedLinear.__init__(self, quantized, packed=packed)
        self.softcap = softcap


def quantizable(model: nn.Module, spared: list[nn.Module]) -> dict[str, nn.Linear]:
    """Module name -> linear layer that a packed copy replaces; none inside `spared`."""
    inside = {id(part) for module in spared for part in module.modules()}
    kinds = (nn.Linear, SoftcappedHead, ReproducibleLinear)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in kinds and id(module) not in inside and min(module.weight.shape) >= SMALLEST
    }


def replaced(layer: nn.Linear, quantized: Quantized, packed: bool = True) -> QuantizedLinear:
    """The layer that takes a linear layer's place."""
    if isinstance(layer, SoftcappedHead):
        return QuantizedSoftcappedHead(quantized, layer.softcap, packed)
    return QuantizedLinear(quantized, layer.bias, isinstance(layer, ReproducibleLinear), packed)


def with_quantized(model: M, layers: dict[str, Quantized], packed: bool = True) -> M:
    """A model like this one that reads these matrices (by module name) and shares everything else with it. packed: they are
    laid out for decoding; else unpacked at each use, without a second copy."""
    made: dict[int, nn.Module] = {}
    for name, quantized in layers.items():
        layer = model.get_submodule(name)
        made.setdefault(id(layer), replaced(layer, quantized, packed))  # type: ignore[arg-type]
    return _copied(model, made)  # type: ignore[return-value]


def with_own_tensors(model: M, shared: Collection[nn.Module] = ()) -> M:
    """A model like this one that stays as it is whatever becomes of this one's tensors: it has copies of all but those of the modules in
    `shared`."""
    known: dict[int, Tensor] = {}

    def own(t: Tensor) -> Tensor:
        if id(t) not in known:
            copy = t.detach().clone()
            known[id(t)] = nn.Parameter(copy, requires_grad=False) if isinstance(t, nn.Parameter) else copy
        return known[id(t)]

    return _copied(model, {id(module): module for module in shared}, own)  # type: ignore[return-value]


def _copied(module: nn.Module, made: dict[int, nn.Module], tensor: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """The tree of modules anew, with the same tensors, or what `tensor` makes of each; modules that are in it twice stay one."""
    if id(module) not in made:
        new = module.__class__.__new__(module.__class__)
        made[id(module)] = new
        own: dict[str, Any] = dict(module.__dict__ if tensor is None else module.__getstate__())
        own["_modules"] = {n: _copied(child, made, tensor) if child is not None else None for n, child in module._modules.items()}
        for kind in ("_parameters", "_buffers") if tensor is not None else ():
            own[kind] = {name: tensor(t) if t is not None else None for name, t in own[kind].items()}  # type: ignore[misc]
        new.__dict__.update(own)
    return made[id(module)]


def quantized_layers(model: nn.Module, spared: list[nn.Module], kind: str, others: dict[str, str]) -> dict[str, Quantized]:
    """What `with_quantized` takes, computed from a model's weights; others: module name -> another format."""
    return {name: quantize(layer.weight, others.get(name, kind)) for name, layer in quantizable(model, spared).items()}
