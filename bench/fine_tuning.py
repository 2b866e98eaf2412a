"""What LoRA and full fine-tuning do to a real model: held-out loss before and after, CPU seconds, memory, bytes saved, answers.

    python -m bench.fine_tuning MODEL [--data FILE.jsonl] [--steps 120] [--rank 8]

MODEL: a Hugging Face folder or a run (docs/fine_tuning.md makes one of SmolLM2-135M-Instruct). Each way is a `treadle train
--objective sft` of its own on the same conversations, the same rows in the same order; the table is Markdown. Minutes to an hour on two
cores, so it is no part of `python -m bench`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import treadle
from treadle.generation.answers import answer_to
from treadle.models.pretrained import load_run

ROOT = Path(__file__).parents[1]
CONVERSATIONS = ROOT / "treadle" / "corpus" / "conversations.jsonl"
QUESTIONS = ("Who does Emma Woodhouse marry?", "Does treadle lose anything when I kill a run?")
NEW_TOKENS = 80


def ways(rank: int) -> dict[str, list[str]]:
    """name -> flags. The rates are the usual ones: adapters take ten times that of whole weights."""
    adapters = ["--lora_rank", str(rank), "--learning_rate", "5e-4"]
    return {
        f"LoRA, rank {rank}": adapters,
        f"LoRA, rank {rank}, bf16 base": [*adapters, "--base_precision", "bf16"],
        f"LoRA, rank {rank}, int8 base": [*adapters, "--base_precision", "int8"],
        "full": ["--learning_rate", "5e-5"],
    }


def train(model: str, data: str, folder: Path, steps: int, flags: list[str]) -> dict[str, Any]:
    """One run: what its files say of it."""
    command = [sys.executable, "-m", "treadle", "train", data, "--from", model, "--objective", "sft", "--output_dir", str(folder),
               "--max_steps", str(steps), "--eval_steps", str(steps), "--eval_on_start", "true", "--sample_tokens", "0",
               "--seq_len", "256", "--per_device_train_batch_size", "2", "--logging_steps", "10", *flags]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}: {done.stderr[-2000:]}{done.stdout[-2000:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row.get("split") == "validation"]
    summary = json.loads((folder / "summary.json").read_text())
    saved = max((folder / "checkpoints").glob("step-*"))
    return {"before": losses[0], "after": losses[-1], "cpu": summary["cpu_seconds"], "peak_gb": summary["peak_memory_gb"],
            "checkpoint_mb": sum(f.stat().st_size for f in saved.rglob("*") if f.is_file()) / 1e6}  # fmt: skip


def answers(run: str) -> list[str]:
    """Greedy answers to QUESTIONS, by the run's own chat template."""
    loaded = load_run(run)
    model, tokenizer = loaded.model, loaded.tokenizer
    template = tokenizer.chat_template
    if template is None:
        raise SystemExit(f"{run} has no chat template")
    prompts = [template.prompt_ids(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
    return [" ".join(answer_to(model, tokenizer, prompt, NEW_TOKENS, temperature=0.0).split()) for prompt in prompts]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fine_tuning", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", default=str(CONVERSATIONS))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--only", nargs="*", default=None, help="beginnings of names")
    parser.add_argument("--output", default="runs/fine_tuning", help="folder of the runs; used ones are read, not trained again")
    asked = parser.parse_args()
    print(f"treadle {treadle.__version__}, {asked.steps} steps of 2 rows x 256 tokens\n")
    print("| | held-out loss before | after | CPU seconds | peak GB | checkpoint MB |\n|---|---|---|---|---|---|")
    said = {"before": answers(asked.model)}
    for name, flags in ways(asked.rank).items():
        if asked.only and not any(name.startswith(one) for one in asked.only):
            continue
        folder = Path(asked.output) / name.replace(",", "").replace(" ", "_")
        got = train(asked.model, asked.data, folder, asked.steps, flags)
        print(f"| {name} | {got['before']:.3f} | {got['after']:.3f} | {got['cpu']:.0f} | {got['peak_gb']:.2f} | {got['checkpoint_mb']:.1f} |",
              flush=True)  # fmt: skip
        said[name] = answers(str(folder))
    for number, question in enumerate(QUESTIONS):
        print(f"\n**{question}**\n\n| | |\n|---|---|")
        for name, texts in said.items():
            print(f"| {name} | {texts[number]} |")


if __name__ == "__main__":
    main()
