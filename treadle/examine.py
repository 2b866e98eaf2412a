"""`treadle doctor`: is this machine ready, is this run sound."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from treadle.checkpoint.layout import checkpoint_name, steps_in
from treadle.checkpoint.reader import Checkpoint
from treadle.checkpoint.retention import best_step
from treadle.errors import CheckpointError, InputError
from treadle.files import cache_root
from treadle.models.pretrained import checkpoint_root

# Extra -> what `import` calls its packages (pyproject.toml has the packages).
EXTRAS = {"hf": ("transformers", "datasets", "gguf"), "parquet": ("pyarrow",), "compressed": ("indexed_gzip", "zstandard"),
          "remote": ("fsspec", "s3fs", "aiohttp"), "sentencepiece": ("sentencepiece",), "wandb": ("wandb",),
          "collatz": ("numba", "matplotlib"), "ray": ("ray",), "deepspeed": ("deepspeed",), "serve": ("starlette", "uvicorn"),
          "eval": ("lm_eval",)}  # fmt: skip


def machine() -> tuple[list[str], bool]:
    """What this machine offers and lacks."""
    import torch

    from treadle.monitor.records import environment
    from treadle.ops import precision
    from treadle.ops.memory import machine_bytes

    found = environment()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cache = cache_root(None)
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    lines = [f"{name} {version}" for name, version in found["versions"].items()]
    lines += [
        f"processor: {found['cores']} cores, {found['threads']} threads in use, {found['cpu_capability']}",
        f"memory: {machine_bytes() / 1e9:.1f} GB",
        f"GPUs: {', '.join(found['gpus']) or 'none'}",
        f"precision = auto gives {precision.resolve('auto', device, 512)} at width 512 "
        f"(bf16 products measured {precision.probe(512):.1f}x fp32)",
        f"cache: {cache} ({free / 1e9:.1f} GB free)",
    ]
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        some = f", without {', '.join(missing)}" if len(missing) < len(modules) else ""
        lines.append(f"extra {extra}: " + (f"not installed{some} (pip install 'treadle[{extra}]')" if missing else "installed"))
    healthy = free > 1e9
    if not healthy:
        lines.append("less than 1 GB is free where data is cached; set TREADLE_CACHE to a larger disk")
    return lines, healthy


def run(folder: str) -> tuple[list[str], bool]:
    """Verifies every checkpoint of a run, byte by byte."""
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{path} does not exist; give a run folder")
    root = checkpoint_root(path)
    lines, sound, damaged = [], [], []
    for step in sorted(steps_in(root)):
        try:
            Checkpoint(root / checkpoint_name(step)).verify()
            sound.append(step)
            lines.append(f"{checkpoint_name(step)}: sound")
        except (CheckpointError, OSError) as problem:
            damaged.append(step)
            lines.append(f"{checkpoint_name(step)}: DAMAGED ({problem})")
    lines += [f"{p.name}: set aside as damaged" for p in sorted(root.glob("damaged-*"))]
    best = best_step(root)
    if best is not None:
        lines.append(f"best: step {best}" + ("" if best in sound else " (not among the sound checkpoints)"))
    if sound:
        lines.append(f"training would go on from step {max(sound)}")
    else:
        lines.append("there is no sound checkpoint to go on from")
    return lines, bool(sound) and not damaged
