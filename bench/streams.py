"""Multi-stream routing, the state-space scan and decoding: each against what it replaces, side by side.

    python -m bench.streams [--rounds 7]
"""

from __future__ import annotations

import torch

import treadle
from bench.side_by_side import medians, run, step_at
from treadle.data.batch import Batch
from treadle.ops import rotations
from treadle.ops.ssd import ssd, ssd_reference

TOKENS, STREAMS, COMPONENTS = 2048, 4, 2


def routing(rounds: int) -> None:
    """The mixing matrices of 2048 tokens, forward and backward."""
    table = torch.randn(TOKENS, STREAMS, STREAMS, requires_grad=True)
    logits = torch.randn(TOKENS, COMPONENTS, requires_grad=True)
    generators = torch.randn(COMPONENTS, rotations.generator_count(STREAMS), requires_grad=True)

    def mixture() -> None:
        turns = rotations.cayley_reference(generators, STREAMS).flatten(1)
        (logits.softmax(-1) @ turns).sum().backward()

    found = medians({
        "sinkhorn": lambda: rotations.sinkhorn_lean(table).sum().backward(),
        "cayley_lie": lambda: rotations.cayley(logits.softmax(-1) @ generators, STREAMS).sum().backward(),
        "cayley_mixture": mixture,
    }, rounds, 10)  # fmt: skip
    for name, goal in (("cayley_lie", 10), ("cayley_mixture", 16)):
        print(f"{name:<16} {found['sinkhorn'] / found[name]:.1f} times cheaper than Sinkhorn in 20 steps (goal {goal})")


def blocks(rounds: int) -> None:
    """One block at D = 512, T = 256, 4 rows, forward and backward."""
    ways, counts = {}, {}
    for name, keys in {"plain": {"num_streams": 1}, "4 streams": {}, "4 streams, mean": {"router_input": "mean"}}.items():
        model = treadle.build("shc", vocab_size=64, hidden_size=512, num_layers=1, num_heads=8, **keys).train()
        batch = Batch.from_ids(torch.randint(0, 64, (4, 256)))
        context = model.context(batch, None)  # type: ignore[operator]
        x = model.embed(batch, context).detach().requires_grad_()  # type: ignore[operator]
        block = model.blocks()[0]
        ways[name] = lambda block=block, x=x, context=context: block(x, context).backward(x.detach())
        counts[name] = sum(p.numel() for p in block.parameters())
    found = medians(ways, rounds, 3)
    for name in list(ways)[1:]:
        print(f"block, {name:<16} {found[name] / found['plain']:.3f} times a plain block (goal 1.25), parameters "
              f"{100 * (counts[name] / counts['plain'] - 1):+.2f}% (goal +1.5%)")  # fmt: skip


def scan(rounds: int) -> None:
    def inputs(length: int) -> list[torch.Tensor]:
        shapes = [(1, 4, length, 33), (1, 4, length), (1, 4, length, 64), (1, 4, length, 64)]
        return [(-torch.rand(s) if len(s) == 3 else torch.randn(s)).requires_grad_() for s in shapes]

    long, short = inputs(512), inputs(64)
    found = medians({
        "loop": lambda: ssd_reference(*long)[0].sum().backward(),
        "512": lambda: ssd(*long)[0].sum().backward(),
        "64": lambda: ssd(*short)[0].sum().backward(),
    }, rounds, 3)  # fmt: skip
    print(f"scan in chunks   {found['loop'] / found['512']:.1f} times faster than a loop over time at T = 512 (goal 20)")
    print(f"scan in chunks   T = 512 costs {found['512'] / found['64']:.1f} times T = 64 (goal 10)")


def decoding(rounds: int) -> None:
    """One more token after 1024 and 8192, D = 256, 4 layers."""
    shape = {"vocab_size": 256, "hidden_size": 256, "num_layers": 4, "num_heads": 4}
    models = {"teacher": treadle.build("shc", **shape), "latent .6": treadle.build("shc", latent_size=153, **shape),
              "student": treadle.build("ssm", **shape), "pure student": treadle.build("ssm", local_window=0, **shape)}  # fmt: skip
    for context in (1024, 8192):
        ways = {name: step_at(model.eval(), context) for name, model in models.items()}
        found = medians(ways, rounds, 4)
        sizes = {name: model.state_bytes(1, context) for name, model in models.items()}
        for name in list(models)[1:]:
            print(f"decoding at {context}: {name:<13} {found['teacher'] / found[name]:5.2f} times the teacher's speed, "
                  f"{sizes['teacher'] / sizes[name]:6.1f} times smaller state ({sizes[name] / 1e3:.0f} kB)")  # fmt: skip


if __name__ == "__main__":
    run("bench.streams", __doc__ or "", (routing, blocks, scan, decoding), 7)
