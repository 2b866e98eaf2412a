"""Byte-level models: the recurrence, ternary products, a training step and generation, each against what it replaces.

    python -m bench.bytes [--rounds 5]
"""

from __future__ import annotations

import argparse
import importlib.util

import torch
import torch.nn.functional as F

import treadle
from bench.streams import medians, step_at
from treadle.data.batch import Batch
from treadle.objectives.next_token import NextToken
from treadle.ops import ternary
from treadle.ops.memory import keep_freed_memory
from treadle.ops.native import library
from treadle.ops.scan import scan, scan_reference


def recurrence(rounds: int) -> None:
    gate, value = torch.rand(8, 512, 512, requires_grad=True), torch.randn(8, 512, 512, requires_grad=True)
    ways = {"naive": lambda: scan_reference(gate, value).sum().backward(),
            "loop": lambda: scan(gate, value, backend="loop").sum().backward()}  # fmt: skip
    if library("scan") is not None:
        ways["native"] = lambda: scan(gate, value, backend="native").sum().backward()
    found = medians(ways, rounds, 1)
    for name, goal in (("loop", 50), ("native", 150)):
        if name in found:
            print(f"recurrence, {name:<7} {found['naive'] / found[name]:.0f} times faster than autograd through a loop (goal {goal})")


def product(rounds: int) -> None:
    for out, goal in ((512, 4), (3072, 15)):
        weight, x = torch.randn(out, 512), torch.randn(1, 512)
        q, _ = ternary.quantize_activations(x)
        codes = ternary.pack(ternary.quantize_weights(weight)[0])
        found = medians({"plain": lambda w=weight, x=x: F.linear(x, w),
                         "packed": lambda q=q, c=codes: ternary.packed_product(q, c)}, rounds, 2000)  # fmt: skip
        print(f"packed product   512 x {out}: {found['plain'] / found['packed']:.1f} times F.linear in fp32 (goal {goal})")


def training(rounds: int) -> None:
    ways = {}
    for name, is_ternary in (("plain", False), ("ternary", True)):
        model = treadle.build("hgrn_bit", vocab_size=256, hidden_size=256, num_layers=4, ternary=is_ternary).train()
        batch = Batch.for_training(torch.randint(0, 256, (8, 256)))
        ways[name] = lambda m=model, b=batch: NextToken()(m, b).losses["next_token"].total.backward()
    found = medians(ways, rounds, 1)
    print(f"training step    ternary takes {found['ternary'] / found['plain']:.2f} of the same model with nn.Linear (goal 1.1)")


def generation(rounds: int) -> None:
    packed = treadle.build("hgrn_bit", "slm_base").eval()
    plain = treadle.build("hgrn_bit", "slm_base", ternary=False).eval()
    ways = {"packed": step_at(packed, 100), "plain": step_at(plain, 100), "packed at 4000": step_at(packed, 4000)}
    if importlib.util.find_spec("transformers") is not None:
        ways["hugging face"] = _hugging_face()
    found = medians(ways, rounds, 10)
    print(f"generation, 25M  {1 / found['packed']:.0f} bytes a CPU second: {found['plain'] / found['packed']:.1f} times the same "
          f"model in fp32 (goal 20)")  # fmt: skip
    print(f"                 position 4000 takes {found['packed at 4000'] / found['packed']:.2f} of position 100 (goal 1.1); state "
          f"{packed.state_bytes(1, 4000) / 1e3:.0f} kB at any")  # fmt: skip
    if "hugging face" in found:
        print(f"                 {found['hugging face'] / found['packed']:.1f} times a GPT-2 of equal size with its cache at 100")


def _hugging_face():  # type: ignore[no-untyped-def]
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=512, n_layer=8, n_head=8, n_positions=1024)).eval()
    with torch.inference_mode():
        cache = model(torch.zeros(1, 100, dtype=torch.int64), use_cache=True).past_key_values

    def step() -> None:
        with torch.inference_mode():
            model(torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bytes", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    keep_freed_memory()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for part in (recurrence, product, training, generation):
        part(given.rounds)


if __name__ == "__main__":
    main()
