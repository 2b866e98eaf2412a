"""Linear layers as the weights they hold: which may be multiplied by one function together."""

from __future__ import annotations

from torch import Tensor, nn

from treadle.ops.linear import linears


def are_plain(*layers: nn.Module) -> bool:
    """Whether calling these is x W^T and nothing else: torch's own class, no bias, nobody's hooks or replacements."""
    return all(
        type(layer) is nn.Linear and layer.bias is None and "forward" not in layer.__dict__ and not layer._forward_hooks
        and not layer._forward_pre_hooks and not layer._backward_hooks and not layer._backward_pre_hooks
        for layer in layers
    )  # fmt: skip


def outputs(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """layer(x) of each; by one function where they allow it. x [..., K], each layer [N_i, K] -> [..., N_i]."""
    if are_plain(*layers):
        return linears(x, *(layer.weight for layer in layers))  # type: ignore[arg-type]
    return tuple(layer(x) for layer in layers)
