"""What the plan says against what a step takes: predicted and measured memory for every architecture, in several shapes.

    python -m bench.plan                  # all cases, about 15 minutes on two slow cores
    python -m bench.plan --only ssm       # cases whose name contains this
    python -m bench.plan --kept           # also with the allocator as `treadle train` sets it: the holes that it keeps
    python -m bench.plan --device cuda    # on a GPU, with larger cases as well

Measured: the growth of a process's resident memory (VmHWM) from before the model is made to the end of the second optimiser
step, after steps of a tiny model and of one block have loaded all code. Freed memory goes back at once, so that it is the tensors' own.
On a GPU: the most that torch's allocator held in tensors.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

DENSE = {"hidden_size": 256, "num_layers": 4, "num_heads": 4, "vocab_size": 2048}
BYTES = {"hidden_size": 256, "num_layers": 4, "vocab_size": 256}
HNET = {"hidden_sizes": [192, 256], "num_blocks": [[1, 0, 1], [3]]}
TINY: dict[str, dict[str, Any]] = {"hnet": {"hidden_sizes": [32, 64], "num_blocks": [[1, 0, 1], [1]]},
                                   "hgrn_bit": {"hidden_size": 32, "num_layers": 1}}  # fmt: skip


@dataclass
class Case:
    """One shape of a step."""

    name: str
    arch: str
    rows: int
    length: int
    keys: dict[str, Any] = field(default_factory=lambda: dict(DENSE))
    precision: str = "fp32"
    optimizer: str = "adamw"
    checkpointing: bool = False
    adapter: dict[str, Any] = field(default_factory=dict)  # keys of [adapter], on a model that is frozen then

    @property
    def tiny(self) -> dict[str, Any]:
        return TINY.get(self.arch, {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 64})

    @property
    def shallow(self) -> dict[str, Any]:
        """Products of the same sizes in as few blocks as there are."""
        fewer = {"num_blocks": [[1, 0, 1], [1]]} if self.arch == "hnet" else {"num_layers": len(self.keys.get("layer_types", "1"))}
        return {**self.keys, **fewer}


GPT2 = {**DENSE, "style": "gpt2", "dropout": 0.1}
CASES = [
    Case("llama", "transformer", 8, 256),
    Case("llama, long rows", "transformer", 2, 1024),
    Case("llama, short rows", "transformer", 16, 128),
    Case("llama, one row, deep", "transformer", 1, 512, {**DENSE, "num_layers": 12, "hidden_size": 384, "num_heads": 6}),
    Case("llama, recomputing", "transformer", 16, 256, {**DENSE, "num_layers": 8, "hidden_size": 384}, checkpointing=True),
    Case("llama, bf16", "transformer", 8, 256, precision="bf16"),
    Case("llama, muon", "transformer", 8, 256, optimizer="muon"),
    Case("llama, normuon", "transformer", 8, 256, optimizer="normuon"),
    Case("llama, 32k tokens", "transformer", 4, 128, {**DENSE, "vocab_size": 32000}),
    Case("llama, adapters", "transformer", 8, 256, adapter={"lora_rank": 8, "lora_dropout": 0.05}),
    Case("llama, adapters, 8 bits", "transformer", 8, 256, adapter={"lora_rank": 8, "base_precision": "int8"}),
    Case("gpt2", "transformer", 8, 256, GPT2),
    Case("inl", "inl", 8, 256),
    *(Case(name, "transformer", 8, 256, {**DENSE, "layer_types": [name]}) for name in ("ssd", "hgrn", "retnet", "rwkv", "gated_deltanet")),
    Case("hybrid, bf16", "transformer", 8, 256, {**DENSE, "layer_types": ["ssd", "ssd", "ssd", "full_attention"]}, precision="bf16"),
    Case("shc", "shc", 4, 256),
    Case("shc, bf16, recomputing", "shc", 8, 256, precision="bf16", checkpointing=True),
    Case("ssm", "ssm", 4, 256),
    Case("ssm, long rows, recomputing", "ssm", 2, 1024, checkpointing=True),
    Case("hgrn_bit", "hgrn_bit", 4, 256, BYTES),
    Case("hgrn_bit, bf16", "hgrn_bit", 4, 256, BYTES, precision="bf16"),
    Case("hnet", "hnet", 8, 256, HNET),
    Case("hnet, bf16", "hnet", 8, 256, HNET, precision="bf16"),
]

WIDE = {"hidden_size": 1024, "num_layers": 12, "num_heads": 16, "vocab_size": 32000}
GPU_CASES = [
    Case("llama, wide, bf16", "transformer", 8, 2048, WIDE, precision="bf16"),
    Case("llama, wide, bf16, recomputing", "transformer", 16, 2048, WIDE, precision="bf16", checkpointing=True),
    Case("gpt2, wide, bf16", "transformer", 8, 1024, {**WIDE, "style": "gpt2", "dropout": 0.0}, precision="bf16"),
    Case("shc, wide, bf16", "shc", 4, 1024, {**WIDE, "num_layers": 6}, precision="bf16"),
]


def predicted_bytes(case: Case, exact: bool, device: str = "cpu") -> float:
    """The peak of one process beyond what it takes without a model."""
    import torch

    from treadle.models.adapters import add_adapters
    from treadle.models.catalogue import MODELS
    from treadle.models.settings import AdapterSettings
    from treadle.objectives.next_token import NextToken
    from treadle.planning.memory import Sizes, per_process
    from treadle.planning.step_trace import Shape, trace_step
    from treadle.training.settings import OptimSettings

    cls = MODELS.get(case.arch)
    config = cls.Config.with_preset(None, **case.keys)
    shape = Shape(case.rows, case.length, 1, case.precision, case.checkpointing)
    adapter = AdapterSettings(**case.adapter) if case.adapter else None
    trace = trace_step(cls, config, NextToken(), shape, cls.example(config, case.rows, case.length),
                       optim=OptimSettings(name=case.optimizer), exact=exact, kind=device, adapter=adapter)  # fmt: skip
    with torch.device("meta"):
        model = cls(config)  # type: ignore[call-arg]
        if adapter is not None:
            add_adapters(model, adapter)
        sizes = replace(Sizes.of(model), loaded=0)  # nothing is read here
    memory = per_process(sizes, trace, shape, "none", 1, None, kind=device)
    return (memory.total_gb - memory.process_gb - memory.kept_gb) * 1e9


def measured_bytes(case: Case, kept: bool = False, device: str = "cpu") -> float:
    """The same of real steps, in a process of its own."""
    command = [sys.executable, "-m", "bench.plan", "--step", json.dumps(asdict(case)), "--device", device,
               *(["--kept"] if kept else [])]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          cwd=Path(__file__).parents[1])  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return float(done.stdout.split()[-1])


def take_steps(case: Case, kept: bool, device: str) -> int:
    """Growth of this process's memory in two steps."""
    import torch

    from treadle.models.adapters import add_adapters
    from treadle.models.catalogue import MODELS
    from treadle.models.settings import AdapterSettings
    from treadle.objectives.base import ModelWithObjective
    from treadle.objectives.next_token import NextToken
    from treadle.ops.memory import keep_freed_memory, peak_resident_bytes, resident_bytes, return_freed_memory
    from treadle.training import resolve
    from treadle.training.optim import Optimizers
    from treadle.training.settings import OptimSettings
    from treadle.training.step import Stepper

    keep_freed_memory() if kept else return_freed_memory()
    cls = MODELS.get(case.arch)

    def steps(keys: dict[str, Any], rows: int, length: int) -> None:
        config = cls.Config.with_preset(None, **keys)
        with torch.device("meta"):
            model = cls(config)  # type: ignore[call-arg]
        if case.adapter:
            add_adapters(model, AdapterSettings(**case.adapter))
        model = model.materialise(0, device)
        resolve.set_checkpointing(model, case.checkpointing)
        module = ModelWithObjective(model, NextToken())
        optimizers = Optimizers(model, OptimSettings(name=case.optimizer))
        stepper = Stepper(module, optimizers, seed=0, precision=case.precision, max_grad_norm=1.0, loss_weights={})
        for step in range(2):
            stepper.run(step, [cls.example(config, rows, length, seed=step).to(device)], 1e-4)

    steps(case.tiny, 1, 64)
    if device == "cpu":  # large products have code and buffers of their own: 12 MB on one processor, none on another
        steps(case.shallow, case.rows, case.length)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        steps(case.keys, case.rows, case.length)
        return torch.cuda.max_memory_allocated() - held
    before = resident_bytes()
    steps(case.keys, case.rows, case.length)
    return peak_resident_bytes() - before


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--kept", action="store_true")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--step", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(take_steps(Case(**json.loads(given.step)), given.kept, given.device))
        return
    print("| case | rows x tokens | quick | exact | measured | quick is | exact is |" + (" with holes |" if given.kept else ""))
    for case in CASES + (GPU_CASES if given.device == "cuda" else []):
        if given.only not in case.name:
            continue
        quick, exact, real = (*(predicted_bytes(case, how, given.device) for how in (False, True)), measured_bytes(case, device=given.device))
        row = f"| {case.name} | {case.rows} x {case.length} | {quick / 1e6:.0f} | {exact / 1e6:.0f} | {real / 1e6:.0f} MB "
        row += f"| {quick / real - 1:+.1%} | {exact / real - 1:+.1%} |"
        if given.kept:
            row += f" {measured_bytes(case, True) / real:.2f} |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
