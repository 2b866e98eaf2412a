"""LoRA on 200 conversations of a real model: the held-out loss falls, answers take the conversations' form, exports keep both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import treadle as command
from treadle.data.batch import Batch
from treadle.models.export import export
from treadle.models.pretrained import load_run, tokenizer_of

SHIPPED = Path(__file__).parents[2] / "treadle" / "corpus" / "conversations.jsonl"
FORM = "In short:"  # with which each shipped answer ends
ASKED = ("Who is Mr. Knightley?", "What is the capital of France?")


def answer(run: Path, question: str, count: int = 96) -> str:
    loaded = load_run(str(run), "cpu")
    tokenizer = tokenizer_of(loaded)
    assert tokenizer.chat_template is not None
    ids = torch.tensor([tokenizer.chat_template.prompt_ids(tokenizer, [{"role": "user", "content": question}])])
    new = loaded.model.generate(ids, count, temperature=0.0, eos_id=tokenizer.eos_id)
    return tokenizer.decode(new[0, ids.shape[1] :].tolist())


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("adapting")
    lines = SHIPPED.read_text().splitlines()
    (home / "train.jsonl").write_text("\n".join(lines[:200]) + "\n")
    (home / "held.jsonl").write_text("\n".join(lines[-40:]) + "\n")
    done = command(
        "train", "train.jsonl", "--from", folder, "--objective", "sft", "--validation_path", "held.jsonl", "--lora_rank", 8, "--seq_len", 256,
        "--packing", "best_fit", "--precision", "fp32", "--batch_size", 2, "--max_steps", 36, "--learning_rate", "2e-3", "--eval_steps", 18,
        "--eval_rows", 6, "--logging_steps", 1,
        "--sample_tokens", 0, "--output_dir", "run", cwd=home, timeout=3400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return home / "run"


def test_the_held_out_loss_falls(run: Path) -> None:
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if "grad_norm" in line]
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]
    evaluated = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    held = [line["loss"] for line in evaluated if line.get("event") == "evaluated" or "eval" in str(line.get("event"))]
    assert len(held) >= 2 and held[-1] < 0.9 * held[0], held


def test_answers_take_the_form_of_the_conversations(run: Path, folder: Path) -> None:
    before, after = [answer(folder, question) for question in ASKED], [answer(run, question) for question in ASKED]
    assert all(FORM not in text for text in before), before
    assert all(FORM in text for text in after), after


def test_the_merged_model_is_what_transformers_computes(run: Path) -> None:
    from transformers import AutoModelForCausalLM

    written = export(str(run), layout="huggingface")
    theirs, ours = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32), load_run(str(run), "cpu")
    tokenizer = tokenizer_of(ours)
    row = torch.tensor([tokenizer.encode("What is the capital of France? In short:").tolist()])
    with torch.no_grad():
        torch.testing.assert_close(ours.model(Batch.from_ids(row)).logits, theirs(row).logits, atol=1e-4, rtol=0)
