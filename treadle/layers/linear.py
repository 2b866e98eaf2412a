"""Linear layers as the weights they hold: which may be multiplied by one function together."""

from __future__ import annotations

from torch import Tensor, nn

from treadle.ops.linear import in_one_product, linears, takes_one_product


def are_plain(*layers: nn.Module, biased: bool = False) -> bool:
    """Whether calling these is x W^T (with `biased` perhaps + b) and nothing else: torch's own class, nobody's hooks or replacements."""
    return all(
        type(layer) is nn.Linear and (biased or layer.bias is None) and "forward" not in layer.__dict__ and not layer._forward_hooks
        and not layer._forward_pre_hooks and not layer._backward_hooks and not layer._backward_pre_hooks
        for layer in layers
    )  # fmt: skip


def outputs(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """layer(x) of each; by one function where they allow it. x [..., K], each layer [N_i, K] -> [..., N_i]."""
    if are_plain(*layers, biased=True):
        weights: list[Tensor] = [layer.weight for layer in layers]  # type: ignore[misc]
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]  # type: ignore[misc]
        if len(biases) in (0, len(layers)):
            return in_one_product(x, weights, biases) if len(layers) > 1 and takes_one_product(x) else linears(x, *weights, biases=biases)
    return tuple(layer(x) for layer in layers)
