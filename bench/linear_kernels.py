"""On a GPU: the chunked recurrences as products of matrices (ops/) beside flash-linear-attention's kernels, forward and backward.

    python -m bench.linear_kernels [--rows 8] [--length 2048] [--rounds 9]

Milliseconds by CUDA events, taken in turns; 8 heads of 64. Ours in fp32, as mixers call it, theirs in bf16, which is all it takes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from treadle.ops.delta_rule import delta_rule
from treadle.ops.flash_linear_attention import agrees, called
from treadle.ops.ssd import ssd
from treadle.ops.wkv import wkv

OURS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {"ssd": ssd, "delta_rule": delta_rule, "wkv": wkv}
HEADS, WIDTH = 8, 64


def arguments(kind: str, rows: int, length: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    first, second, v = (torch.randn(rows, HEADS, length, WIDTH, device="cuda") * 0.3 for _ in range(3))
    log_decay = -torch.rand(rows, HEADS, length, device="cuda") * 0.1
    if kind == "ssd":
        return v, log_decay, first, second
    if kind == "delta_rule":
        return first, F.normalize(second, dim=-1), v, log_decay, torch.rand(rows, HEADS, length, device="cuda")
    return first, second, v, log_decay[..., None].expand(-1, -1, -1, WIDTH).contiguous(), torch.ones(HEADS, WIDTH, device="cuda")


def milliseconds(way: Callable[[], torch.Tensor], given: list[torch.Tensor]) -> float:
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    y = way()
    torch.autograd.grad(y.float().square().mean(), given)
    ended.record()
    torch.cuda.synchronize()
    return begun.elapsed_time(ended)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.linear_kernels", description=__doc__)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.linear_kernels needs a GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {asked.rows} rows x {asked.length}, {HEADS} heads of {WIDTH}")
    for kind, ours in OURS.items():
        if not agrees(kind, torch.bfloat16, "cuda:0"):
            print(f"{kind:<12} no kernel of flash-linear-attention agrees here")
            continue
        given = [t.requires_grad_() for t in arguments(kind, asked.rows, asked.length)]
        ways = {
            "ours": lambda ours=ours, given=given: ours(*given)[0],
            "theirs": lambda kind=kind, given=given: called(kind, torch.bfloat16, None, *given),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(asked.rounds + 2):
            for name, way in ways.items():
                found = milliseconds(way, given)
                if number > 1:  # the first two compile and warm up
                    taken[name].append(found)
        a, b = (statistics.median(values) for values in taken.values())
        print(f"{kind:<12} products {a:.2f} ms, kernel {b:.2f} ms: {a / b:.1f} times as fast", flush=True)


if __name__ == "__main__":
    main()
