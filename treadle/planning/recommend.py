"""The largest preset that fits into a memory, with the batch that goes with it.

Presets are tried from the largest down. Weights, gradients and optimiser state alone rule most of them out; activations are
traced for what is left, without and with gradient checkpointing. They grow with the rows and with the layers, so traces of
one row through one and two layers give all of them (a trace of 25 layers takes ten seconds and more).
"""

from __future__ import annotations

from treadle.errors import ConfigError
from treadle.models.base import Model, ModelConfig, parameter_count
from treadle.models.catalogue import MODELS
from treadle.objectives.next_token import NextToken
from treadle.planning.memory import PROCESS_GB, Shape, Sizes, per_process, trace_activations
from treadle.training.config import DEFAULT_ARCHITECTURE

STATE_BYTES = 16  # of a parameter in training: weight, gradient and two moments in fp32
GLOBAL_BATCH = 64  # rows of a step; what does not fit at once is accumulated
USED = 0.95  # of the memory is planned with; the allocator's holes and the estimate's error take the rest
READING_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def recommend(
    vram_gb: float, training: bool = True, arch: str = DEFAULT_ARCHITECTURE, seq_len: int = 1024, precision: str = "bf16"
) -> dict[str, object]:
    """Dotted keys of a configuration: the largest preset of `arch` that trains (or, training=False, generates) in
    `vram_gb` * 1e9 bytes of one GPU on rows of `seq_len` tokens. ConfigError where none does."""
    if not isinstance(vram_gb, (int, float)) or isinstance(vram_gb, bool) or not 0 < vram_gb < float("inf"):
        raise ConfigError(f"vram_gb = {vram_gb!r}: give the gigabytes of one device, as in vram_gb=12")
    if precision not in READING_BYTES:
        raise ConfigError(f"precision = {precision!r}: give one of {', '.join(READING_BYTES)}")
    cls = MODELS.get(arch)
    name = MODELS.canonical(arch)
    counts = {preset: parameter_count(cls, cls.Config.with_preset(preset)) for preset in cls.Config.presets()}
    for preset, count in sorted(counts.items(), key=lambda item: -item[1]):
        each = STATE_BYTES if training else READING_BYTES[precision]
        if count * each / 1e9 + PROCESS_GB["cuda"] > USED * vram_gb:
            continue
        base: dict[str, object] = {"model.arch": name, "model.preset": preset, "data.seq_len": seq_len, "train.precision": precision}
        if not training:
            return base
        found = _training_keys(name, preset, vram_gb, seq_len, precision)
        if found is not None:
            return {**base, **found}
    smallest = min(counts, key=lambda preset: counts[preset], default=None)
    raise ConfigError(f"no preset of {name} {'trains' if training else 'runs'} in {vram_gb:g} GB with rows of {seq_len} tokens "
                      f"(the smallest is {smallest}); use shorter rows, or give the shape yourself: --num_layers, --hidden_size")  # fmt: skip


def _training_keys(arch: str, preset: str, vram_gb: float, seq_len: int, precision: str) -> dict[str, object] | None:
    """The most rows at once (a power of two) that fit, with and without gradient checkpointing; None where not even one does."""
    import torch

    cls = MODELS.get(arch)
    with torch.device("meta"):
        model = cls(cls.Config.with_preset(preset))
    sizes = Sizes.of(model)
    for checkpointing in (False, True):
        row = _activations(cls, model.config, Shape(1, seq_len, 2, precision, checkpointing))
        best = 0
        for rows in (1, 2, 4, 8, 16, 32, 64):
            shape = Shape(rows, seq_len, GLOBAL_BATCH // rows, precision, checkpointing)
            need = per_process(sizes, rows * row, shape, "none", 1, None, kind="cuda")
            best = rows if need.total_gb <= USED * vram_gb else best
        if best:
            return {"train.per_device_train_batch_size": best, "train.gradient_accumulation_steps": GLOBAL_BATCH // best,
                    "train.gradient_checkpointing": checkpointing}  # fmt: skip
    return None


def _activations(cls: type[Model], config: ModelConfig, shape: Shape) -> int:
    layers = getattr(config, "num_layers", 0)
    if layers < 4:
        return trace_activations(cls, config, NextToken(), shape, cls.example(config, shape.micro_batch, shape.length))
    shallow = [config.model_copy(update={"num_layers": n}) for n in (1, 2)]
    one, two = (trace_activations(cls, c, NextToken(), shape, cls.example(c, shape.micro_batch, shape.length)) for c in shallow)
    return one + (layers - 1) * max(0, two - one)
