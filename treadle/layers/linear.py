"""Linear layers as the weights they hold: which may be multiplied by one function together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from treadle.layers.fp8 import Fp8Linear, in_8_bits
from treadle.ops.fp8 import fp8_linears
from treadle.ops.linear import in_one_product, linears, takes_one_product


def are_plain(*layers: nn.Module, biased: bool = False, kind: type[nn.Linear] = nn.Linear) -> bool:
    """Whether calling these is x W^T (with `biased` perhaps + b) and nothing else: torch's own class (or `kind`), nobody's hooks or
    replacements."""
    return all(
        type(layer) is kind and (biased or layer.bias is None) and "forward" not in layer.__dict__ and not layer._forward_hooks
        and not layer._forward_pre_hooks and not layer._backward_hooks and not layer._backward_pre_hooks
        for layer in layers
    )  # fmt: skip


def outputs(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """layer(x) of each; by one function where they allow it. x [..., K], each layer [N_i, K] -> [..., N_i]."""
    if in_8_bits(*layers):
        if are_plain(*layers, biased=True, kind=Fp8Linear) and (held := _held(layers)) is not None:
            return fp8_linears(x, *held)
    elif are_plain(*layers, biased=True) and (held := _held(layers)) is not None:
        return in_one_product(x, *held) if len(layers) > 1 and takes_one_product(x) else linears(x, *held[0], biases=held[1])
    return tuple(layer(x) for layer in layers)


def _held(layers: Sequence[nn.Module]) -> tuple[list[Tensor], list[Tensor]] | None:
    """Weights and biases of linear layers; none where some have a bias and others do not."""
    weights: list[Tensor] = [layer.weight for layer in layers]  # type: ignore[misc]
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]  # type: ignore[misc]
    return (weights, biases) if len(biases) in (0, len(layers)) else None
