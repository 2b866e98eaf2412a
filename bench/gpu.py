"""One GPU in under ten minutes: its limits, GPT-2 124M in every trainer, each architecture's step, and the plan's memory.

    python -m bench.gpu                          # writes results/gpu-DATE.json, which `python -m bench` judges
    python -m bench.gpu --device cpu --tiny      # the same code at toy sizes, to see that it works; its figures mean nothing

Parts run in processes of their own with a time limit each, so that one that fails or runs out of memory costs its own row. Times are
medians of groups of steps between two synchronisations of the device. Peers: `python -m bench.peers.environment`.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.peers import environment
from bench.task import Task

HERE = Path(__file__).parent
LARGE = Task(width=768, layers=12, heads=12, vocabulary=50304, length=1024, rows=32, learning_rate=6e-4)
TOY = Task(width=32, layers=2, heads=2, vocabulary=128, length=32, rows=2)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "transformer": {}, "inl": {}, "shc": {}, "ssm": {}, "hgrn_bit": {},
    "hnet": {"hidden_sizes": [384, 512], "num_blocks": [[2, 0, 2], [8]]},
    "transformer of ssd": {"layer_types": ["ssd"]}, "transformer of gated_deltanet": {"layer_types": ["gated_deltanet"]},
    "transformer of rwkv": {"layer_types": ["rwkv"]}, "transformer of retnet": {"layer_types": ["retnet"]},
}  # fmt: skip
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0}  # dense bf16, the makers' data sheets


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_each(way: Callable[[], Any], device: str, group: int, groups: int = 5, warm: int = 3) -> float:
    """Median over groups of `group` calls, in seconds a call."""
    for _ in range(warm):
        way()
    taken = []
    for _ in range(groups):
        synchronize(device)
        begun = time.perf_counter()
        for _ in range(group):
            way()
        synchronize(device)
        taken.append((time.perf_counter() - begun) / group)
    return statistics.median(taken)


# ---- parts: (device, tiny) -> {name: number or reason} ----


def ceilings(device: str, tiny: bool) -> dict[str, Any]:
    """TFLOP/s of products at the model's shapes, of attention forward and backward, and GB/s of copying."""
    task, found = TOY if tiny else LARGE, {}
    tokens, group = task.tokens_per_step, 2 if tiny else 20
    for dtype in (torch.bfloat16, torch.float32):
        for what, k, n in (("block", task.width, 4 * task.width), ("head", task.width, task.vocabulary), ("large", *(128 if tiny else 8192,) * 2)):
            rows = tokens if what != "large" else n
            left, right = torch.randn(rows, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
            each = seconds_each(lambda left=left, right=right: left @ right, device, group)
            found[f"products, {what}, {str(dtype)[6:]}: TFLOP/s"] = 2 * rows * k * n / each / 1e12
            del left, right
    q, k, v = (torch.randn(task.rows, task.heads, task.length, task.width // task.heads, device=device, dtype=torch.bfloat16, requires_grad=True)
               for _ in range(3))  # fmt: skip
    attention = 2 * 2 * task.rows * task.heads * task.length**2 * (task.width // task.heads) / 2  # causal
    each = seconds_each(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), device, group)
    found["attention forward, causal, bf16: TFLOP/s"] = attention / each / 1e12

    def both() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    found["attention forward and backward, causal, bf16: TFLOP/s"] = 3.5 * attention / seconds_each(both, device, group) / 1e12
    source = torch.ones(2**16 if tiny else 2**28, device=device)
    target = torch.empty_like(source)
    found["copying: GB/s"] = 2 * source.nbytes / seconds_each(lambda: target.copy_(source), device, group) / 1e9
    return found


def documents(task: Task, count: int, seed: int) -> torch.Tensor | None:
    """doc_ids [rows, length] of `count` documents a row, cut at random; None for 0."""
    if not count:
        return None
    draw = torch.Generator().manual_seed(seed)
    cuts = torch.stack([torch.randperm(task.length - 1, generator=draw)[: count - 1] + 1 for _ in range(task.rows)])
    return (torch.arange(task.length)[None, :, None] >= cuts[:, None, :]).sum(-1)


def stepper_of(model: Any, precision: str, learning_rate: float) -> Any:
    from treadle.objectives.base import ModelWithObjective
    from treadle.objectives.next_token import NextToken
    from treadle.training.optim import Optimizers
    from treadle.training.settings import OptimSettings
    from treadle.training.step import Stepper

    optimizers = Optimizers(model, OptimSettings(learning_rate=learning_rate))
    return Stepper(ModelWithObjective(model, NextToken()), optimizers, seed=0, precision=precision, max_grad_norm=1.0, loss_weights={})


def our_steps(device: str, tiny: bool, compiled: bool, packed: int = 0, precision: str = "bf16") -> dict[str, Any]:
    """Our model and step at GPT-2's shape; packed: so many documents a row, of other lengths in each."""
    from bench.peers.ours import our_model
    from treadle.data.batch import Batch
    from treadle.training import resolve

    task = TOY if tiny else LARGE
    model = our_model(task).to(device)
    if precision == "fp8":
        resolve.use_fp8(model)
    if compiled:
        resolve.compile_blocks(model)
    stepper = stepper_of(model, precision, task.learning_rate)
    data = task.data()
    rows = [torch.from_numpy(task.batch(data, i)) for i in range(4)]
    batches = [Batch.from_ids(r[:, :-1].contiguous(), labels=r[:, 1:].contiguous(), doc_ids=documents(task, packed, seed)).to(device)
               for seed, r in enumerate(rows)]  # fmt: skip
    steps, losses = iter(range(10**6)), []

    def step() -> None:
        number = next(steps)
        losses.append(stepper.run(number, [batches[number % 4]], task.learning_rate).losses["next_token"])

    name = f"124M ours {'compiled' if compiled else 'eager'}{f', {packed} documents a row' if packed else ''}"
    return step_figures(name, step, task, model.parameter_count(), device, tiny, losses)


def step_figures(
    name: str, step: Callable[[], None], task: Task, parameters: int, device: str, tiny: bool, losses: list[float]
) -> dict[str, Any]:
    """Tokens per second, TFLOP/s and peak memory of a step."""
    begun = time.perf_counter()
    step()
    synchronize(device)
    first = time.perf_counter() - begun
    each = seconds_each(step, device, 1 if tiny else 5)
    flops = 6 * parameters * task.tokens_per_step + 12 * task.layers * task.width * task.length * task.tokens_per_step
    found = {f"{name}: tokens per second": task.tokens_per_step / each, f"{name}: TFLOP/s": flops / each / 1e12,
             f"{name}: seconds of the first step": first, f"{name}: parameters": parameters,
             f"{name}: last loss over first": float(losses[-1]) / float(losses[0])}  # fmt: skip
    if device == "cuda":
        found[f"{name}: peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def plain_steps(device: str, tiny: bool, compiled: bool) -> dict[str, Any]:
    """The nanoGPT-style loop: bf16 autocast, fused AdamW, whole-model compile."""
    from bench.peers.plain import PlainGPT

    task = TOY if tiny else LARGE
    torch.manual_seed(task.seed)
    torch.set_float32_matmul_precision("high")
    model = PlainGPT(task).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    run = torch.compile(model) if compiled else model
    data = task.data()
    rows = [torch.from_numpy(task.batch(data, i)).to(device) for i in range(4)]
    steps, losses = iter(range(10**6)), []

    def step() -> None:
        row = rows[next(steps) % 4]
        with torch.autocast(device, torch.bfloat16):
            loss = run(row[:, :-1].contiguous(), row[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    count = sum(p.numel() for p in model.parameters())
    return step_figures(f"124M plain {'compiled' if compiled else 'eager'}", step, task, count, device, tiny, losses)


def trainer_steps(device: str, tiny: bool, compiled: bool) -> dict[str, Any]:
    """Hugging Face's Trainer with its GPT-2, bf16."""
    import tempfile

    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    name, task = f"124M HF Trainer {'compiled' if compiled else 'eager'}", TOY if tiny else LARGE
    config = GPT2Config(vocab_size=task.vocabulary, n_positions=task.length, n_embd=task.width, n_layer=task.layers, n_head=task.heads,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    torch.manual_seed(task.seed)
    model, data, stamps = GPT2LMHeadModel(config), task.data(), []
    model.loss_type = "ForCausalLM"
    steps = 6 if tiny else 30

    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return task.rows * steps

        def __getitem__(self, index: int) -> dict[str, Any]:
            row = torch.from_numpy(task.batch(data, index // task.rows % 4)[index % task.rows, : task.length])
            return {"input_ids": row, "labels": row}

    class Stamp(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            synchronize(device)
            stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=task.rows, logging_steps=1000, bf16=True,
            learning_rate=task.learning_rate, save_strategy="no", report_to=[], use_cpu=device == "cpu", torch_compile=compiled,
            disable_tqdm=True, lr_scheduler_type="constant", max_grad_norm=1.0, dataloader_num_workers=0 if tiny else 4,
        )  # fmt: skip
        Trainer(model=model, args=settings, train_dataset=Rows(), callbacks=[Stamp()]).train()
    gaps = [b - a for a, b in itertools.pairwise(stamps[2:])]
    found = {f"{name}: tokens per second": task.tokens_per_step / statistics.median(gaps), f"{name}: parameters": model.num_parameters()}
    if device == "cuda":
        found[f"{name}: peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def architectures(device: str, tiny: bool) -> dict[str, Any]:
    """A training step of each, bf16, beside the dense one per parameter."""
    import treadle
    from treadle.models.catalogue import MODELS

    usual = {"hidden_size": 32, "num_layers": 2, "num_heads": 2} if tiny else {"hidden_size": 512, "num_layers": 8, "num_heads": 8}
    rows, length, vocabulary = (2, 32, 64) if tiny else (16, 1024, 8192)
    found: dict[str, Any] = {}
    for name, keys in ARCHITECTURES.items():
        arch = name.split()[0]
        fields = MODELS.get(arch).Config.model_fields
        if keys.get("layer_types") in (["rwkv"],) and device == "cuda" and importlib.util.find_spec("fla") is not None:
            found[f"{name}: tokens per second"] = "skipped (Triton tunes flash-linear-attention's wkv for more than five minutes)"
            continue
        keys = {"hidden_sizes": [32, 40], "num_blocks": [[1, 0, 1], [1]]} if tiny and arch == "hnet" else keys
        own = {key: value for key, value in usual.items() if key in fields} if arch != "hnet" else {}
        try:
            model = treadle.build(arch, **{**own, "vocab_size": vocabulary, **keys}).to(device)
            stepper = stepper_of(model, "bf16", 1e-4)
            batch = type(model).example(model.config, rows, length).to(device)
            steps = iter(range(10**6))
            each = seconds_each(lambda s=stepper, b=batch, n=steps: s.run(next(n), [b], 1e-4), device, 1 if tiny else 3, groups=3)
        except Exception as problem:  # one architecture must not hide the others
            found[f"{name}: tokens per second"] = f"FAILED ({type(problem).__name__}: {str(problem)[:200]})"
            continue
        parameters = model.parameter_count()
        found[f"{name}: tokens per second"] = rows * length / each
        found[f"{name}: parameters"] = parameters
        found[f"{name}: ns per token and million parameters"] = each / (rows * length) / parameters * 1e15
        del model, stepper, batch
        if device == "cuda":
            torch.cuda.empty_cache()
    dense = found.get("transformer: ns per token and million parameters")
    for name in list(ARCHITECTURES)[1:]:
        mine = found.get(f"{name}: ns per token and million parameters")
        if isinstance(mine, float) and isinstance(dense, float):
            found[f"{name} over dense, time per token and parameter"] = mine / dense
    return found


def plan(device: str, tiny: bool) -> dict[str, Any]:
    """What `treadle plan` predicts beside the peak of real steps."""
    from bench import plan as planned

    cases = planned.CASES[:1] if tiny else [case for case in planned.GPU_CASES if "recomputing" not in case.name]
    found: dict[str, Any] = {}
    for case in cases:
        case = replace(case, rows=1, length=64) if tiny else case
        real = planned.measured_bytes(case, device=device)
        found[f"{case.name}: measured GB"] = real / 1e9
        found[f"{case.name}: plan over measured"] = planned.predicted_bytes(case, True, device) / real
    return found


def serving(device: str, tiny: bool) -> dict[str, Any]:
    """Tokens per second that the engine writes: one request at a time, sixteen together, 124M parameters."""
    from bench.peers.ours import our_model
    from bench.serving import answered, requests
    from treadle.generation.engine import Engine

    task, found = TOY if tiny else LARGE, {}
    new = 4 if tiny else 64
    for weights in ("bf16", "int8"):
        engine = Engine(our_model(replace(task, length=512)).to(device), rows=16, max_len=256, weights=weights)
        engine.start()
        prompts = requests(task.vocabulary)
        answered(engine, prompts[:2], 2, 2)
        for name, count, together in (("one at a time", 3, 1), ("sixteen at once", 16, 16)):
            begun = time.perf_counter()
            answered(engine, prompts[:count], new, together)
            found[f"serving {weights}, {name}: tokens per second"] = count * new / (time.perf_counter() - begun)
        engine.stop()
        pair = [found[f"serving {weights}, {name}: tokens per second"] for name in ("sixteen at once", "one at a time")]
        found[f"serving {weights}, sixteen over one"] = pair[0] / pair[1]
    return found


PARTS: dict[str, tuple[Callable[[str, bool], dict[str, Any]], str | None, int]] = {  # function, package, seconds allowed
    "ceilings": (ceilings, None, 60),
    "ours eager": (lambda d, t: our_steps(d, t, False), None, 90),
    "ours compiled": (lambda d, t: our_steps(d, t, True), None, 150),
    "ours compiled, 8 documents a row": (lambda d, t: our_steps(d, t, True, 8), None, 150),
    "ours compiled, fp8": (lambda d, t: our_steps(d, t, True, precision="fp8"), None, 150),
    "plain eager": (lambda d, t: plain_steps(d, t, False), None, 60),
    "plain compiled": (lambda d, t: plain_steps(d, t, True), None, 120),
    "HF Trainer compiled": (lambda d, t: trainer_steps(d, t, True), "accelerate", 150),
    "HF Trainer eager": (lambda d, t: trainer_steps(d, t, False), "accelerate", 90),
    "architectures": (architectures, None, 150),
    "plan": (plan, None, 120),
    "serving": (serving, None, 60),
}
COMPILED = {name for name in PARTS if "compiled" in name}
TOTAL = 570  # seconds: one command under ten minutes


def run_part(name: str, device: str, tiny: bool, left: float) -> dict[str, Any]:
    """A part in a process of its own."""
    _, package, allowed = PARTS[name]
    label = f"124M {name}: tokens per second" if " " in name else name
    if package and environment.version(package) is None:
        return {label: environment.missing(package)}
    if left < 20:
        return {label: "skipped (ten minutes are over)"}
    line = [environment.python() if package else sys.executable, "-m", "bench.gpu", "--part", name, "--device", device, *(["--tiny"] if tiny else [])]
    try:
        done = subprocess.run(line, cwd=HERE.parent, capture_output=True, text=True, timeout=min(allowed, left))
    except subprocess.TimeoutExpired:
        return {label: f"FAILED (not done after {min(allowed, left):.0f} s)"}
    if done.returncode:
        return {label: f"FAILED ({done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else done.returncode})"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def ratios(found: dict[str, Any]) -> dict[str, Any]:
    """Ours over each peer, and shares of the measured limit."""
    made: dict[str, Any] = {}

    def speed(name: str) -> Any:
        return found.get(f"124M {name}: tokens per second", "skipped (not measured)")

    for ours, other in (("ours compiled", "plain compiled"), ("ours eager", "plain eager"), ("ours compiled", "HF Trainer compiled"),
                        ("ours eager", "HF Trainer eager"), ("ours compiled", "ours eager"), ("ours compiled, 8 documents a row", "ours compiled"),
                        ("ours compiled, fp8", "ours compiled")):  # fmt: skip
        pair = [speed(ours), speed(other)]
        reason = next((one for one in pair if isinstance(one, str)), None)
        made[f"124M {ours} over {other}"] = reason or pair[0] / pair[1]
    limit = found.get("products, large, bfloat16: TFLOP/s")
    for name in ("ours eager", "ours compiled", "plain compiled"):
        mine = found.get(f"124M {name}: TFLOP/s")
        if isinstance(mine, float) and isinstance(limit, float):
            made[f"124M {name}: share of the measured bf16 limit"] = mine / limit
    return made


def measure(quick: bool, device: str = "cuda", tiny: bool = False, only: list[str] | None = None) -> dict[str, Any]:
    """All parts, or some; without a GPU only the reason (python -m bench.gpu --device cpu --tiny tries the code)."""
    if device == "cuda" and not torch.cuda.is_available():
        return {"gpu": "skipped (no GPU here)"}
    if quick and not tiny:
        return {"gpu": "skipped (minutes; python -m bench.gpu)"}
    begun, found = time.perf_counter(), {}
    for name in only or PARTS:
        if tiny and name in COMPILED and quick:
            continue
        found |= (more := run_part(name, device, tiny, TOTAL - (time.perf_counter() - begun)))
        for what, value in more.items():
            print(f"  {what}: {value if isinstance(value, str) else format(value, ',.4g')}", flush=True)
    return found | ratios(found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: to see that the code works")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=f"some of: {', '.join(PARTS)}; into the same result")
    parser.add_argument("--output", type=Path, help="default: results/gpu-DATE.json for a GPU, none for --tiny or the CPU")
    given = parser.parse_args()
    if given.part:
        print(json.dumps(PARTS[given.part][0](given.device, given.tiny)))
        return
    toy = given.tiny or given.device == "cpu"
    if toy:
        print("Figures need a GPU: these sizes only show that the code works.")
    path = given.output or (None if toy else HERE / "results" / f"gpu-{time.strftime('%Y%m%d')}.json")
    found = measure(False, given.device, given.tiny, given.only)
    if given.only and path is not None and path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))["parts"]["gpu"] | found
        found |= ratios(found)
    for name, value in ratios(found).items():
        print(f"  {name}: {value if isinstance(value, str) else format(value, '.3f')}")
    if "gpu" in found:
        raise SystemExit(found["gpu"])
    if path is not None:
        from bench import machine

        about = machine.describe()
        if given.device == "cuda":
            card = torch.cuda.get_device_name()
            about |= {"gpu": card, "cuda": torch.version.cuda, "gpu_gb": torch.cuda.get_device_properties(0).total_memory / 1e9,
                      "data_sheet_bf16_tflops": next((peak for name, peak in PEAK_TFLOPS.items() if name in card), None)}  # fmt: skip
        path.write_text(json.dumps({"machine": about, "tiny": given.tiny, "parts": {"gpu": found}}, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
