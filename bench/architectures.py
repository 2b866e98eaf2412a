"""Every registered model beside a dense transformer of equal parameters: python -m bench.architectures [--quick] [--precision bf16]

A step is forward, backward and AdamW on random bytes; a dense model of the same width and depth gets the MLP that makes its
parameters equal, and the two take turns. "kept" is what the forward pass keeps for the backward pass beside the weights; decoding is
one more token after so many.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import treadle
from bench.side_by_side import in_turns, step_at
from treadle.data.batch import Batch
from treadle.models.base import Model, parameter_count
from treadle.models.catalogue import MODELS
from treadle.models.transformer import Transformer, TransformerConfig
from treadle.objectives.next_token import NextToken
from treadle.ops.memory import keep_freed_memory
from treadle.ops.precision import autocast, resolve

MIXERS = ["block_sparse_attention", "linear_attention", "ssd", "hgrn", "retnet", "rwkv", "gated_deltanet"]
CONTEXTS = {"1k": 1024, "8k": 8192}
DECODING = ("decoding ms", "state bytes")
RATIO = "over dense: step time"
SOURCE = 64  # tokens that an encoder reads


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    rows: int
    length: int
    rounds: int


FULL, QUICK = Size(192, 4, 8, 256, 7), Size(128, 2, 2, 128, 3)


def cases(size: Size) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> (architecture, keys). Each registered model, and each token mixer of the transformer alone and in a hybrid."""
    shape = {"hidden_size": size.width, "num_layers": size.layers, "num_heads": 4}
    inner = size.width * 4 // 3 // 16 * 16
    own: dict[str, dict[str, Any]] = {
        "hgrn_bit": {"hidden_size": size.width, "num_layers": size.layers},
        "hnet": {"hidden_sizes": [size.width, inner], "num_blocks": [[1, 0, 1], [size.layers - 1]]},
        "encoder_decoder": {**shape, "source_length": SOURCE},
        "collatz": {**shape, "stopping_head": False},
    }
    found = {name: (name, own.get(name, shape)) for name in MODELS.names() if name != "transformer"}
    found["shc_sinkhorn"] = ("shc", {**shape, "routing": "sinkhorn"})
    found["inl_lite"] = ("inl", {**shape, "dynamics": "lite"})
    found |= {name: ("transformer", {**shape, "layer_types": [name]}) for name in MIXERS}
    found["hybrid"] = ("transformer", {**shape, "layer_types": ["ssd", "full_attention"]})
    return found


def dense_of(parameters: int, size: Size) -> dict[str, Any]:
    """The keys of a transformer with as many parameters, to 1%; deeper where an MLP alone would be out of proportion."""
    shape = {"hidden_size": size.width, "num_layers": size.layers, "num_heads": 4}

    def count(**keys: Any) -> int:
        return parameter_count(Transformer, TransformerConfig.with_preset(None, vocab_size=256, **{**shape, **keys}))

    while count(intermediate_size=6 * size.width) < parameters:
        shape["num_layers"] += 1
    at, wider = (count(intermediate_size=width) for width in (32, 48))
    return {**shape, "intermediate_size": max(16, 32 + 16 * round((parameters - at) / (wider - at)))}


def batch_for(arch: str, size: Size) -> Batch:
    generator = torch.Generator().manual_seed(0)
    batch = Batch.for_training(torch.randint(0, 256, (size.rows, size.length), generator=generator))
    if arch != "encoder_decoder":
        return batch
    return replace(batch, extras={**batch.extras, "source": torch.randint(3, 256, (size.rows, SOURCE), generator=generator)})


def stepper(model: Model, batch: Batch, precision: str) -> tuple[Callable[[], Any], Callable[[], int]]:
    """(a whole step, the bytes that its forward pass keeps)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def loss() -> torch.Tensor:
        with autocast(precision, torch.device("cpu")):
            return torch.stack([one.total for one in NextToken()(model, batch).losses.values()]).sum()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    def kept() -> int:
        seen: dict[int, Any] = {}  # the storages themselves: a freed one could have its address taken by another

        def pack(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss()
        return sum(storage.nbytes() for storage in seen.values())

    return step, kept


def least(ways: dict[str, Callable[[], Any]], rounds: int) -> list[float]:
    """The least CPU seconds of each: what else the machine does only ever adds."""
    return [min(taken) for taken in in_turns(ways, rounds).values()]


def measure(quick: bool, precision: str = "auto", only: list[str] | None = None) -> dict[str, Any]:
    size = QUICK if quick else FULL
    precision = resolve(precision, torch.device("cpu"), size.width)
    found: dict[str, Any] = {}
    for name, (arch, keys) in cases(size).items():
        if only and name not in only:
            continue
        model = treadle.build(arch, vocab_size=256, **keys).train()
        dense = treadle.build("transformer", vocab_size=256, **dense_of(model.parameter_count(), size)).train()
        ways, kept = zip(*(stepper(one, batch_for(kind, size), precision) for one, kind in ((model, arch), (dense, "transformer"))))
        own, plain = least(dict(zip(("own", "dense"), ways)), size.rounds)
        bytes_kept = [each() for each in kept]
        values = {"parameters": model.parameter_count(), "step ms": 1e3 * own, RATIO: own / plain, "kept MB": bytes_kept[0] / 1e6,
                  "kept, by dense": bytes_kept[0] / bytes_kept[1]}  # fmt: skip
        if arch != "encoder_decoder" and model.capabilities.decodes:
            for label, context in CONTEXTS.items():
                values[f"decoding ms at {label}"] = 1e3 * least({"decoding": step_at(model.eval(), context)}, size.rounds)[0]
                values[f"state bytes at {label}"] = model.state_bytes(1, context)
        found |= {f"{name}: {what}" if what != RATIO else f"{name} {RATIO}": value for what, value in values.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.architectures", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small shape, in half a minute")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--only", nargs="*", help="some of the models")
    given = parser.parse_args()
    keep_freed_memory()
    found = measure(given.quick, given.precision, given.only)
    columns = ["parameters", "step ms", RATIO, "kept MB", "kept, by dense", *(f"{what} at {label}" for label in CONTEXTS for what in DECODING)]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in dict.fromkeys(key.split(":")[0].split(" over ")[0] for key in found):
        print(name)
        for column in columns:
            value = found.get(f"{name} {RATIO}" if column == RATIO else f"{name}: {column}")
            if value is not None:
                print(f"    {column.removeprefix('over '):<24}{f'{value:,}' if isinstance(value, int) else f'{value:.2f}':>16}")


if __name__ == "__main__":
    main()
