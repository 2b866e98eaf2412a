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
        "--packing", "best_fit", "--precision", "fp32", "--batch_size", 2, "--max_steps", 36, "--learning_rate", "2e-3", "--eval_steps", 36,
        "--eval_rows", 6, "--logging_steps", 1,
        "--sample_tokens", 0, "--output_dir", "run", cwd=home, timeout=3400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return home / "run"


def held_out_loss(run: Path) -> float:
    """Nats a learnt token over the last 40 conversations, by whole forward passes."""
    loaded = load_run(str(run), "cpu")
    tokenizer, nats, count = tokenizer_of(loaded), 0.0, 0
    assert tokenizer.chat_template is not None
    for line in SHIPPED.read_text().splitlines()[-40:]:
        ids, mask = tokenizer.chat_template.encode(tokenizer, json.loads(line)["messages"])
        row, learnt = torch.from_numpy(ids).long()[None], torch.from_numpy(mask)[1:]
        with torch.no_grad():
            logs = loaded.model(Batch.from_ids(row)).logits[0, :-1].log_softmax(-1)
        nats -= float(logs.gather(1, row[0, 1:, None])[learnt].sum())
        count += int(learnt.sum())
    return nats / count


def test_the_held_out_loss_falls(run: Path, folder: Path) -> None:
    before, after = held_out_loss(folder), held_out_loss(run)
    assert after < 0.9 * before, (before, after)


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
