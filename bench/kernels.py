"""What the compiled kernels of the dense block save, operation by operation and for a whole step: python -m bench.kernels

Each row takes turns between the kernel and the torch form of the same function (same saved tensors, same products) in one
process, A B A B; the ratio is the median of the pairs' CPU seconds. A step is the trainer's own, with clipping and AdamW."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import treadle
from treadle.data.batch import Batch
from treadle.layers.rope import rotate, rotation
from treadle.objectives.base import ModelWithObjective
from treadle.objectives.next_token import NextToken
from treadle.ops.attention import block_causal
from treadle.ops.cross_entropy import linear_cross_entropy
from treadle.ops.fused import without_kernels
from treadle.ops.gelu import gelu_mlp
from treadle.ops.linear import linears
from treadle.ops.memory import keep_freed_memory
from treadle.ops.residual import residual_sum
from treadle.ops.rms_norm import add_rms_norm, keep_rms_norm
from treadle.ops.swiglu import swiglu
from treadle.training.optim import Optimizers
from treadle.training.settings import OptimSettings
from treadle.training.step import Stepper

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pairs(run: Callable[[], Any], rounds: int) -> dict[str, float]:
    """CPU milliseconds of both forms and their ratio."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(rounds + 1):
        for kernel in (True, False):
            begun = time.process_time()
            if kernel:
                run()
            else:
                with without_kernels():
                    run()
            if turn:  # the first only warms up
                times[kernel].append(time.process_time() - begun)
    ratio = statistics.median(slow / max(fast, 1e-9) for fast, slow in zip(times[True], times[False]))
    return {"torch_ms": statistics.median(times[False]) * 1e3, "kernel_ms": statistics.median(times[True]) * 1e3, "ratio": ratio}


def operations(precision: str, rows: int, length: int, width: int, heads: int, vocabulary: int) -> dict[str, Callable[[], Any]]:
    """Forward and backward of each, by name; inputs of the types that they have inside a step."""
    narrow, tokens, inner = DTYPES[precision], rows * length, 8 * width // 3
    stream, branch, gain = torch.randn(tokens, width), torch.randn(tokens, width).to(narrow), torch.ones(width)
    projections, angles = torch.randn(rows, length, heads, width // heads).to(narrow), rotation(torch.arange(length)[None], width // heads)
    qkv = [torch.randn(rows, heads, length, width // heads).to(narrow) for _ in range(3)]
    matrices = [torch.randn(shape) * width**-0.5 for shape in ((inner, width), (inner, width), (width, inner))]
    head, labels = torch.randn(vocabulary, width) * width**-0.5, torch.randint(0, vocabulary, (tokens,))
    segments = ((length,),) * rows

    def both(function: Callable[..., Any], *inputs: Tensor) -> Callable[[], Any]:
        leaves = [x.clone().requires_grad_() for x in inputs]

        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                made = function(*leaves)
            outs = made if isinstance(made, tuple) else (made,)
            torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])

        return run

    return {
        "norm of a stream": both(keep_rms_norm, stream, gain),
        "norm of a sum": both(add_rms_norm, stream, branch, gain),
        "residual sum": both(residual_sum, stream, branch),
        "rotation": both(lambda x: rotate(x.transpose(1, 2), *angles), projections),
        "attention": both(lambda q, k, v: block_causal(q, k, v, segments), *qkv),
        "three projections": both(linears, branch, *(torch.randn(width, width) * width**-0.5 for _ in range(3))),
        "swiglu and its products": both(swiglu, branch, *matrices),
        "gelu and its products": both(gelu_mlp, branch, matrices[0], matrices[2], torch.zeros(inner), torch.zeros(width)),
        "head and cross-entropy": both(lambda h, w: linear_cross_entropy(h, w, labels), branch, head),
    }


def step(precision: str, rows: int, length: int, width: int, heads: int, layers: int, vocabulary: int) -> Callable[[], Any]:
    """One optimiser step of a model of these sizes."""
    torch.manual_seed(0)
    model = treadle.build("transformer", vocab_size=vocabulary, hidden_size=width, num_layers=layers, num_heads=heads)
    stepper = Stepper(ModelWithObjective(model, NextToken()), Optimizers(model, OptimSettings()), seed=0, precision=precision,
                      max_grad_norm=1.0, loss_weights={})  # fmt: skip
    batch = Batch.for_training(torch.randint(0, vocabulary, (rows, length)))
    return lambda: stepper.run(0, [batch], 1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=6, default=[16, 256, 384, 6, 6, 256], help="rows, tokens in a row, width, heads, layers, vocabulary")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("operations", "step"))
    given = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    rows, length, width, heads, layers, vocabulary = given.shape
    table: dict[str, dict[str, dict[str, float]]] = {}
    for precision in DTYPES:
        table[precision] = {}
        found = operations(precision, rows, length, width, heads, vocabulary) if given.only != "step" else {}
        if given.only != "operations":
            found["step"] = step(precision, rows, length, width, heads, layers, vocabulary)
        for name in list(found):
            table[precision][name] = pairs(found.pop(name), given.rounds)
    print(json.dumps({"shape": given.shape, "threads": given.threads, "torch": torch.__version__, "table": table}, indent=1))


if __name__ == "__main__":
    main()
