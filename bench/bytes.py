"""Byte-level models: the recurrence, ternary products, a training step and generation, each against what it replaces.

    python -m bench.bytes [--rounds 5]
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import treadle
from bench.side_by_side import medians, run, step_at
from treadle.data.batch import Batch
from treadle.objectives.next_token import NextToken
from treadle.ops import ternary
from treadle.ops.native import library
from treadle.ops.scan import scan, scan_reference

BYTES = 64


def recurrence(rounds: int) -> None:
    gate, value = torch.rand(8, 512, 512, requires_grad=True), torch.randn(8, 512, 512, requires_grad=True)
    slope = torch.randn(8, 512, 512)

    def both(function: Callable[..., Any], **keys: Any) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(gate, value, **keys), (gate, value), slope)

    ways = {"naive": both(scan_reference), "loop": both(scan, backend="loop")}
    if library("scan") is not None:
        ways["native"] = both(scan, backend="native")
    found = medians(ways, rounds, 1)
    for name, goal in (("loop", 50), ("native", 150)):
        if name in found:
            print(f"recurrence, {name:<7} {found['naive'] / found[name]:.0f} times faster than autograd through a loop (goal {goal})")


def product(rounds: int) -> None:
    """A layer of one row, norm and rounding included, as the compiled block calls it: in C, with its buffers held."""
    compiled = ternary.native()
    if compiled is None:
        print("packed product   no C compiler here")
        return
    how = ctypes.addressof(ternary.setting(1e-8, torch.get_num_threads()))
    for out, goal in ((512, 4), (3072, 15)):
        weight, x, y = torch.randn(out, 512), torch.randn(1, 512), torch.empty(1, out)
        layer = ternary.PackedLayer(*ternary.quantize_weights(weight), torch.ones(512), 1e-8)
        given = (layer.at, how, x.data_ptr(), y.data_ptr(), 1)
        found = medians({"plain": lambda w=weight, x=x: F.linear(x, w),
                         "packed": lambda given=given, keep=layer: compiled.ternary_layer(*given)}, rounds, 2000)  # fmt: skip
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
    prompt = torch.zeros(1, 4, dtype=torch.int64)
    ways: dict[str, Callable[[], Any]] = {"packed": lambda: packed.generate(prompt, BYTES), "plain": lambda: plain.generate(prompt, BYTES)}
    if importlib.util.find_spec("transformers") is not None:
        ways["hugging face"] = _hugging_face(prompt)
    found = medians(ways, rounds, 1)
    print(f"generation, 25M  {BYTES / found['packed']:.0f} bytes a CPU second: {found['plain'] / found['packed']:.1f} times the same "
          f"model in fp32 (goal 20)")  # fmt: skip
    if "hugging face" in found:
        print(f"                 {found['hugging face'] / found['packed']:.1f} times Hugging Face's generate of a GPT-2 of equal size")


def steps(rounds: int) -> None:
    for arch, preset in (("hgrn_bit", "slm_base"), ("hnet", "hnet_bit_1stage"), ("hnet", "hnet_bit_2stage")):
        model = treadle.build(arch, preset).eval()
        found = medians({"100": step_at(model, 100), "4000": step_at(model, 4000)}, rounds, 10)
        print(f"step             {preset:<16} position 4000 takes {found['4000'] / found['100']:.2f} of position 100 (goal 1.1); state "
              f"{model.state_bytes(1, 100) / 1e3:.1f} kB at 100, {model.state_bytes(1, 4000) / 1e3:.1f} kB at 4000")  # fmt: skip


def _hugging_face(prompt: torch.Tensor) -> Callable[[], Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=512, n_layer=8, n_head=8, n_positions=1024, eos_token_id=255)).eval()
    mask = torch.ones_like(prompt)
    return lambda: model.generate(prompt, attention_mask=mask, max_new_tokens=BYTES, min_new_tokens=BYTES, do_sample=True, top_k=50,
                                  top_p=0.9, pad_token_id=255)  # fmt: skip


if __name__ == "__main__":
    run("bench.bytes", __doc__ or "", (recurrence, product, training, generation, steps), 5)
