"""Generation beside Hugging Face's `generate`: the same weights in both, one process and thread, in turns, CPU seconds.

    python -m bench.generate [--quick] [--run RUN]

A Llama shape of 13.8M parameters (6 x 384, 8192 tokens, tied), greedy, prompts of 32 tokens; theirs in fp32, which is the faster
of its formats on a CPU. Medians over rounds; a ratio above 1 says that ours takes fewer CPU seconds. What fewer bits cost is
measured on held-out text of a run: `--run`, else a small model trained here for it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.side_by_side import medians, one_thread, show

SHAPE = {"vocab_size": 8192, "hidden_size": 384, "num_layers": 6, "num_heads": 6}
FORMATS = ("fp32", "bf16", "int8", "int4")
PROMPT, ROWS, LONG = 32, 16, 4096
LOSS_LIMITS = {"bf16": 0.001, "int8": 0.005, "int4": 0.02}


def models() -> tuple[Any, Any | None]:
    """(ours, Hugging Face's of the same weights or None where transformers is missing)."""
    import treadle
    from treadle.models.export import save_for_transformers

    ours = treadle.build("transformer", **SHAPE, max_position_embeddings=2 * LONG, initializer_range=0.05).eval()
    try:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import AutoModelForCausalLM
    except ImportError:
        return ours, None
    with tempfile.TemporaryDirectory() as folder:
        save_for_transformers(ours, folder)
        return ours, AutoModelForCausalLM.from_pretrained(folder).eval()


def theirs(model: Any, ids: Any, count: int, mask: Any = None) -> Callable[[], Any]:
    import torch

    mask = torch.ones_like(ids) if mask is None else mask
    return lambda: model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)


def decoding(ours: Any, other: Any | None, quick: bool) -> dict[str, Any]:
    """Batch 1 and 16: CPU milliseconds a step of each, the time of a prompt left out, and ratios."""
    import torch

    values: dict[str, Any] = {}
    short, longer, rounds = (2, 10, 1) if quick else (4, 68, 5)
    for rows in (1, ROWS):
        ids = torch.randint(0, SHAPE["vocab_size"], (rows, PROMPT), generator=torch.Generator().manual_seed(rows))
        ways: dict[str, Callable[[], Any]] = {}
        for count in (short, longer):
            if other is not None:
                ways[f"Hugging Face fp32 {count}"] = theirs(other, ids, count)
            for weights in FORMATS:
                ways[f"{weights} {count}"] = lambda weights=weights, count=count, ids=ids: ours.generate(ids, count, temperature=0, weights=weights)
        found = medians(ways, rounds)
        steps = {name: (found[f"{name} {longer}"] - found[f"{name} {short}"]) / (longer - short) * 1e3
                 for name in ([] if other is None else ["Hugging Face fp32"]) + list(FORMATS)}  # fmt: skip
        for name, milliseconds in steps.items():
            values[f"batch {rows}, {name}: CPU ms a step"] = milliseconds
        for weights in FORMATS:
            values[f"batch {rows}, {weights} over Hugging Face fp32"] = (
                "skipped (transformers is not installed)" if other is None else steps["Hugging Face fp32"] / steps[weights]
            )  # fmt: skip
    return values


def mixed(ours: Any, other: Any | None, quick: bool) -> dict[str, Any]:
    """Sixteen prompts of 5 to 80 tokens in one batch: each row against itself alone, and speed against padding."""
    import torch

    generator, count = torch.Generator().manual_seed(0), 8 if quick else 32
    lengths = [5 * (number + 1) for number in range(ROWS)]
    prompts = [torch.randint(0, SHAPE["vocab_size"], (length,), generator=generator).tolist() for length in lengths]
    values: dict[str, Any] = {}
    for weights in FORMATS:
        together = ours.generate(prompts, count, temperature=0, weights=weights)[:, -count:]
        same = sum(ours.generate(row, count, temperature=0, weights=weights)[0, -count:].tolist() == together[number].tolist()
                   for number, row in enumerate(prompts[:4] if quick else prompts))  # fmt: skip
        values[f"mixed lengths, {weights}: share of rows equal to themselves alone"] = same / (4 if quick else ROWS)
    if other is None:
        return values
    longest = max(lengths)
    ids, mask = torch.zeros(ROWS, longest, dtype=torch.int64), torch.zeros(ROWS, longest, dtype=torch.int64)
    for number, row in enumerate(prompts):
        ids[number, longest - len(row) :], mask[number, longest - len(row) :] = torch.tensor(row), 1
    ways: dict[str, Callable[[], Any]] = {"theirs": theirs(other, ids, count, mask)}
    for weights in FORMATS:
        ways[weights] = lambda weights=weights: ours.generate(prompts, count, temperature=0, weights=weights)
    found = medians(ways, 1 if quick else 3)
    for weights in FORMATS:
        values[f"mixed lengths, {weights} over Hugging Face fp32"] = found["theirs"] / found[weights]
    return values


def first_token(ours: Any, other: Any | None, quick: bool) -> dict[str, Any]:
    """CPU seconds from a long prompt to the first token."""
    import torch

    length = 512 if quick else LONG
    ids = torch.randint(0, SHAPE["vocab_size"], (1, length), generator=torch.Generator().manual_seed(3))
    ways: dict[str, Callable[[], Any]] = {} if other is None else {"Hugging Face fp32": theirs(other, ids, 1)}
    for weights in FORMATS:
        ways[weights] = lambda weights=weights: ours.generate(ids, 1, temperature=0, weights=weights)
    found = medians(ways, 1 if quick else 3)
    values: dict[str, Any] = {f"first token after {length}, {name}: CPU s": seconds for name, seconds in found.items()}
    for weights in FORMATS if other is not None else ():
        values[f"first token after {length}, {weights} over Hugging Face fp32"] = found["Hugging Face fp32"] / found[weights]
    return values


def trained(quick: bool, folder: Path) -> str:
    """A run to measure quality on: 2 x 128 on bytes, a minute; for a figure that counts give a run of your own."""
    import treadle

    keys = {"max_steps": 30 if quick else 400, "hidden_size": 128, "num_layers": 2, "num_heads": 4, "tokenizer.name": "byte", "seq_len": 128,
            "eval_rows": 16, "sample_tokens": 0, "learning_rate": 3e-3}  # fmt: skip
    treadle.train(None, quiet=True, output_dir=str(folder / "run"), **keys)
    return str(folder / "run")


def quality(quick: bool, run: str | None) -> dict[str, Any]:
    """Loss on held-out text, minus that in fp32 (nats a token), and speculation's tokens a step on that text."""
    from treadle.evaluation.report import evaluate_run
    from treadle.models.pretrained import load_run

    values: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        name = run or trained(quick, Path(folder))
        for weights, limit in LOSS_LIMITS.items():
            cost = evaluate_run(name, rows=16 if quick else None, with_baselines=False, weights=weights)["weights"]
            values[f"loss change, {weights}"] = cost["loss_change"]
            values[f"loss change, {weights}: within its limit"] = float(cost["loss_change"] <= limit)
        loaded = load_run(name)
        values |= speculation(loaded.model, loaded.tokenizer, quick)
    return values


def speculation(model: Any, tokenizer: Any, quick: bool) -> dict[str, Any]:
    """Greedy continuation by n-grams and by the same model in 4 bits as its draft: CPU seconds against one token a step."""
    ids, count = tokenizer.prompt_ids("It is a truth universally acknowledged, that a single man"), 20 if quick else 200
    values: dict[str, Any] = {}
    tally: dict[str, int] = {}
    plain = model.generate(ids, count, temperature=0)
    guessed = model.generate(ids, count, temperature=0, speculative="ngram", statistics=tally)
    values["speculation by n-grams: same tokens"] = float(plain.tolist() == guessed.tolist())
    values["speculation by n-grams: tokens a step"] = (tally["steps"] + tally["kept"]) / max(1, tally["steps"])
    found = medians({"plain": lambda: model.generate(ids, count, temperature=0),
                      "ngram": lambda: model.generate(ids, count, temperature=0, speculative="ngram")}, 1 if quick else 5)  # fmt: skip
    values["speculation by n-grams over one token a step"] = found["plain"] / found["ngram"]
    return values


def measure(quick: bool, run: str | None = None) -> dict[str, Any]:
    """Everything on one thread, by name; a text where there is no number."""
    values: dict[str, Any] = {}
    with one_thread():
        ours, other = models()
        for part in (decoding, mixed, first_token):
            values |= part(ours, other, quick)
        try:
            values |= quality(quick, run)
        except Exception as problem:  # training a run for it must not cost the figures above
            values["loss change"] = f"FAILED ({type(problem).__name__}: {str(problem)[-200:]})"
    return values


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and short: for correctness, not for figures")
    parser.add_argument("--run", help="a trained run to measure quality on")
    given = parser.parse_args()
    show(measure(given.quick, given.run))


if __name__ == "__main__":
    main()
