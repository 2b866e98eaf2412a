"""Which tensors are alive when: every allocation and release of a step, of tensors without contents.

A dispatch mode sees each operation's results; a storage that nobody holds any more says so through its weak reference, as it
would be freed. What an operation takes and gives back inside one kernel is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Kind = Literal["activations", "gradients", "casts", "kept"]


@dataclass(frozen=True)
class Moment:
    """A point of the step and the bytes that are alive there beyond weights and the optimiser's state. part: "embedding",
    "forward", "loss", "backward" or "optimiser step"; block: which, inside forward and backward. casts: weights in 16 bits."""

    part: str
    block: int
    activations: float
    gradients: float
    casts: float = 0.0


@dataclass
class Ledger:
    """Bytes alive by kind ("kept": weights and state, which are always there), and the fullest moments of each part."""

    alive: dict[str, int] = field(default_factory=lambda: {"activations": 0, "gradients": 0, "casts": 0, "kept": 0})
    entered: dict[tuple[str, int], int] = field(default_factory=dict)  # part -> activations when it began
    products: set[Any] = field(default_factory=set)  # of bf16 matrices: each kind once, by its operation, shapes and strides
    _fullest: dict[tuple[str, int], list[Moment]] = field(default_factory=dict)
    _known: dict[int, list[Any]] = field(default_factory=dict)  # id of a storage -> its weak reference, bytes, kind
    _here: tuple[str, int] = ("embedding", 0)

    def mark(self, part: str, block: int = 0) -> None:
        """What is alive from here on counts for this part."""
        self._here = (part, block)
        self.entered.setdefault(self._here, self.alive["activations"])
        self._look()

    def moments(self) -> list[Moment]:
        """Of each part in order: where it holds most in all, and where most activations."""
        return [moment for found in self._fullest.values() for moment in found]

    def sort(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Says what these are; they may be known already. Of any shapes."""
        for tensor in tensors:
            self.add(tensor, kind)
            entry = self._known.get(id(tensor.untyped_storage()))
            if entry is not None:
                self.alive[entry[2]] -= entry[1]
                self.alive[kind] += entry[1]
                entry[2] = kind
        self._look()

    def is_weight(self, tensor: Tensor) -> bool:
        """It was sorted as what is always there. Of any shape."""
        entry = self._known.get(id(tensor.untyped_storage()))
        return entry is not None and entry[2] == "kept"

    def add(self, tensor: Tensor, kind: Kind = "activations") -> None:
        """Counts a tensor's storage if it is new. Of any shape."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known or not size:
            return

        def released(_: Any) -> None:
            _, size, kind = self._known.pop(key)
            self.alive[kind] -= size

        self._known[key] = [weakref.ref(storage, released), size, kind]
        self.alive[kind] += size
        self._look()

    def _look(self) -> None:
        activations, gradients, casts = self.alive["activations"], self.alive["gradients"], self.alive["casts"]
        now = Moment(*self._here, activations, gradients, casts)
        found = self._fullest.setdefault(self._here, [now, now])
        if activations + gradients + casts > found[0].activations + found[0].gradients + found[0].casts:
            found[0] = now
        if (activations, gradients) > (found[1].activations, found[1].gradients):
            found[1] = now


PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "addmm", "bmm", "baddbmm")}


class Watch(TorchDispatchMode):
    """Enters what operations make into a ledger; a weight in fewer bits is a cast."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.ledger = ledger

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        made = operation(*arguments, **(named or {}))
        if operation is torch.ops.aten._to_copy.default and self.ledger.is_weight(arguments[0]) and made.itemsize < arguments[0].itemsize:
            self.ledger.sort([made], "casts")
            return made
        if operation.overloadpacket in PRODUCTS:
            factors = [t for t in arguments if isinstance(t, Tensor)]
            if factors[-1].dtype == torch.bfloat16:
                self.ledger.products.add((operation.overloadpacket, *((t.shape, t.stride()) for t in factors)))
        for leaf in (made,) if isinstance(made, Tensor) else pytree.tree_leaves(made):
            if isinstance(leaf, Tensor):
                self.ledger.add(leaf)
        return made


def storages(tensors: Iterable[Tensor]) -> int:
    """Bytes of all, shared ones once. Of any shapes."""
    return sum({id(s): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def leaf_of(made: Any) -> Tensor | None:
    """The first tensor of what a block returns that has a gradient. Of any shape."""
    return next((t for t in pytree.tree_leaves(made) if isinstance(t, torch.Tensor) and t.requires_grad), None)
