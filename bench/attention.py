"""Attention over packed documents on CPU: one full-causal pass that leaks, against the exact ways, forward and backward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.ops.attention import Segments, attention_reference, block_causal
from treadle.ops.memory import keep_freed_memory

ROWS, HEADS, LENGTH, WIDTH = 8, 6, 512, 64


def packed_rows(seed: int = 0) -> Segments:
    """Rows filled with documents of lognormal(4.8, 0.8) lengths."""
    dice, rows = np.random.default_rng(seed), []
    for _ in range(ROWS):
        runs, left = [], LENGTH
        while left:
            runs.append(int(min(left, max(1, dice.lognormal(4.8, 0.8)))))
            left -= runs[-1]
        rows.append(tuple(runs))
    return tuple(rows)


def main(rounds: int = 5, repeats: int = 5) -> None:
    keep_freed_memory()
    segments = packed_rows()
    doc_ids = torch.stack([torch.repeat_interleave(torch.arange(len(r)), torch.tensor(r)) for r in segments])
    whole = ((LENGTH,),) * ROWS
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(ROWS, HEADS, LENGTH, WIDTH).to(dtype).requires_grad_() for _ in range(3))
        ways: dict[str, Callable[[], Tensor]] = {
            "full causal, leaky (torch)": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            "full causal, blocks (ours)": lambda q=q, k=k, v=v: block_causal(q, k, v, whole),
            "documents, blocks (ours)": lambda q=q, k=k, v=v: block_causal(q, k, v, segments),
            "documents, dense mask (torch)": lambda q=q, k=k, v=v: attention_reference(q, k, v, doc_ids),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                way().sum().backward()
                begun = time.process_time()
                for _ in range(repeats):
                    way().sum().backward()
                seconds[name].append(time.process_time() - begun)
        base = statistics.median(seconds["full causal, leaky (torch)"])
        for name, taken in seconds.items():
            print(f"{dtype!s:<16} {name:<30} {statistics.median(taken) / base:.2f} of its CPU time")


if __name__ == "__main__":
    main()
