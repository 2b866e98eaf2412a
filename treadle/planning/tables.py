"""The plan for people: one recipe in words, and the table of sizes against common memories."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from treadle.models.base import count_label
from treadle.models.catalogue import MODELS
from treadle.planning.recommend import ROWS, STATE_BYTES, USED, Preset, presets_of

BANDS = (8, 12, 16, 24, 40, 80)  # gigabytes of common GPUs


def lines(result: dict[str, Any]) -> list[str]:
    """The plan for people."""
    m, name = result["memory"], " ".join(filter(None, (result["architecture"], result["preset"])))
    passes = result["gradient_accumulation_steps"]
    each = f"{result['per_device_train_batch_size']} x {result['seq_len']} tokens" + (f" x {passes}" if passes > 1 else "")
    text = [
        f"{name}: {count_label(result['parameters'])} parameters{_trained(result)}; {result['world']} process(es), {result['mode']}, "
        f"{each} each, {result['precision']}",
        f"memory of one process: {m['total_gb']:.2f} GB at the peak ({m['phase']})",
        f"  weights {m['params_gb']:.2f}, gradients {m['grads_gb']:.2f}, optimiser {m['optimizer_gb']:.2f}, activations "
        f"{m['activations_gb']:.2f}, loss {m['logits_gb']:.2f}, weights in 16 bits {m['casts_gb']:.2f}, gathered {m['gathered_gb']:.2f}, copies while saving {m['saving_gb']:.2f}, the process "
        f"itself {m['process_gb']:.2f}" + (f", kept by the allocator {m['kept_gb']:.2f}" if m["kept_gb"] else ""),
    ]
    text += _block_lines(result)
    if "inference" in result:
        i = result["inference"]
        text.append(f"to generate {result['per_device_train_batch_size']} x {result['seq_len']} tokens: {i['total_gb']:.2f} GB (weights in fp32 "
                    f"{i['params_gb']:.2f}, laid out for decoding in {result['weights']} {i['laid_out_gb']:.2f}, decoding state {i['state_gb']:.2f}, the pass over the prompt {i['activations_gb']:.2f})")  # fmt: skip
    if result["world"] > 1:
        text.append("a process, GB              weights  gradients  optimiser  activations  gathered   peak")
        text += [f"  {name:<25}{r['params_gb']:>7.2f}{r['grads_gb']:>11.2f}{r['optimizer_gb']:>11.2f}{r['activations_gb']:>13.2f}"
                 f"{r['gathered_gb']:>10.2f}{r['total_gb']:>7.2f}" for name, r in result["ranks"].items()]  # fmt: skip
        t = result["traffic_gb"]
        text.append(f"communication of one process in a step: {t['total']:.3f} GB sent (gathered {t['gather']:.3f}, "
                    f"scattered {t['scatter']:.3f}, reduced {t['reduce']:.3f})")  # fmt: skip
        text.append("processes  seconds a step    tokens/s  efficiency (estimated, rows of one process kept)")
        text += [f"{row['world']:>9}  {row['step_seconds']:>14.3f}  {row['tokens_per_second']:>10.0f}  {row['efficiency']:>10.0%}"
                 for row in result["scaling"]]  # fmt: skip
    a = result["assumptions"]
    text += _time_lines(result)
    source = "a product of matrices on this machine's CPU; --measure runs the model's own, --gpu or --flops name another device"
    if a["step_measured_here"]:
        source = "of this model's own passes, measured on this machine's CPU"
    elif a["gpu"]:
        source = f"{a['utilisation']:.0%} of the data sheet of {a['gpu']}; --utilisation"
    elif not a["flops_measured_here"]:
        source = "given by --flops"
    text.append(f"assumed: {a['flops_per_second'] / 1e12:.3f} TFLOP/s a process ({source}), "
                f"{a['bandwidth_bytes_per_second'] / 1e9:.0f} GB/s between processes (--bandwidth), communication hides "
                f"behind {a['overlap']:.0%} of the computing (--overlap); activations are those of "
                f"{'a GPU' if result['device'] == 'cuda' else 'the CPU'}'s kernels, traced over "
                f"{'the whole model' if result['exact'] else 'two and three of the repeating blocks (--exact: over all)'}")  # fmt: skip
    if "rehearsal_bytes" in result:
        counted = ", ".join(f"{kind} {size / 1e9:.3f} GB" for kind, size in sorted(result["rehearsal_bytes"].items()))
        text.append(f"rehearsed: one step of process 0 of {result['world']} under fsdp runs; its collectives handle {counted}")
    if "asked" in result:
        text.append(_verdict("inference" in result, **result["asked"]))
    return text


def _trained(result: dict[str, Any]) -> str:
    """The share that is trained, where that is not all."""
    own, every = result["trained_parameters"], result["parameters"]
    return f", of which {count_label(own)} are trained ({own / every:.1%})" if own < every else ""


def _verdict(reads: bool, unit: str, memory: float, needs: float, fits: bool, tries: Sequence[str] = ()) -> str:
    digits = 2 if max(memory, needs) < 100 else 0
    compared = f"needs {needs:.{digits}f} {unit} of the {memory:.10g} {unit} asked for ({needs / memory:.0%})"
    if fits:
        return f"{compared}: it fits"
    less = "fewer and shorter texts" if reads else "fewer rows and gradient checkpointing"
    said = f"; {' or '.join(tries)} would do" if tries else f"; {less} are not enough: choose a smaller model"
    return f"{compared}: it does not fit" + said


def _block_lines(result: dict[str, Any]) -> list[str]:
    """Parameters of each block, and what it keeps for its backward pass; equal neighbours in one line."""
    text, first = [], 0
    for (own, kept), group in groupby(result["blocks"], key=lambda b: (b["parameters"], f"{b['activations_gb'] * 1e3:.3g}")):
        last = first + len(list(group)) - 1
        numbers = f"block {first}" if first == last else f"blocks {first} to {last}"
        text.append(f"  {numbers}: {count_label(own)} parameters, {kept} MB kept for the backward pass" + ("" if first == last else ", each"))
        first = last + 1
    return [*text, f"  outside blocks: {count_label(result['outside_blocks'])} parameters"]


def _time_lines(result: dict[str, Any]) -> list[str]:
    t = result["time"]
    text = [f"time: {t['flops_per_token'] / 1e6:.4g} million operations a token; {t['tokens_per_second']:.4g} tokens/s, {t['step_seconds']:.3g} s a step"]
    if t["tokens"] is not None:
        text.append(f"  {t['tokens']:.4g} tokens take {t['hours']:.4g} hours: --max_steps {t['steps']}")
    return text


# ---- the table of sizes ----


def size_table(arch: str, length: int, bands: Sequence[float] = BANDS, kind: str = "cuda") -> dict[str, Any]:
    """For each preset and memory (GB): rows of `length` tokens that train at once in bf16, plain and with gradient
    checkpointing, and texts of `length` tokens generated at once; 0 where none."""
    rows = []
    for name, count in reversed(presets_of(arch)):
        preset = Preset(MODELS.canonical(arch), name, kind)
        fits = length <= preset.longest() and count * STATE_BYTES / 1e9 <= max(bands)
        needs = {again: {r: preset.training_gb(r, length, "bf16", again) for r in ROWS} for again in (False, True)} if fits else {}
        one, two = (preset.reading_gb(n, length) for n in (1, 2)) if length <= preset.longest() else (0.0, 0.0)
        reads = {r: one + (r - 1) * (two - one) for r in ROWS} if one else {}
        rows.append({
            "preset": name, "parameters": count,
            "trains": {band: _most(needs.get(False, {}), band) for band in bands},
            "trains_with_checkpointing": {band: _most(needs.get(True, {}), band) for band in bands},
            "generates": {band: _most(reads, band) for band in bands},
        })  # fmt: skip
    return {"architecture": MODELS.canonical(arch), "seq_len": length, "device": kind, "bands_gb": list(bands), "presets": rows}


def _most(needs: dict[int, float], band: float) -> int:
    return max((rows for rows, need in needs.items() if need <= USED * band), default=0)


def table_lines(table: dict[str, Any]) -> list[str]:
    """The table for people."""
    bands = table["bands_gb"]
    text = [f"{table['architecture']}, rows of {table['seq_len']} tokens: rows at once in a memory of ... GB"]
    head = f"{'preset':<16}{'size':>7}  " + "".join(f"{f'{band:g}':>8}" for band in bands)
    for title, cell in (("training (bf16, AdamW; with c: gradient checkpointing)", _training_cell), ("generating", _reading_cell)):
        text += [title, head]
        text += [f"{row['preset']:<16}{count_label(row['parameters']):>7}  " + "".join(f"{cell(row, band):>8}" for band in bands)
                 for row in table["presets"]]  # fmt: skip
    text.append(f"assumed: weights, gradients and AdamW's moments in fp32, one {'GPU' if table['device'] == 'cuda' else 'CPU process'}, nothing "
                f"else in its memory, {1 - USED:.0%} of it left free; at most {ROWS[0]} rows; '-': not even one row; generating holds "
                "weights in fp32 and a decoding state for every row. Estimates, not runs: treadle check RECIPE runs a step")  # fmt: skip
    return text


def _training_cell(row: dict[str, Any], band: float) -> str:
    plain, again = row["trains"][band], row["trains_with_checkpointing"][band]
    return str(plain) if plain >= max(again, 4) else f"{again}c" if again > plain else str(plain or "-")


def _reading_cell(row: dict[str, Any], band: float) -> str:
    return str(row["generates"][band] or "-")
