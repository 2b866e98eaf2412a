"""A real model, offline: as transformers computes it, as llama.cpp does, in conversation, by its hub name and out again."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import treadle
from tests.conftest import make_text
from tests.conftest import treadle as command
from tests.models.huggingface.llama_cpp import LlamaCpp
from tests.realmodel.conftest import WHEEL
from tools import smollm2
from treadle.data.batch import Batch
from treadle.models.base import Model
from treadle.models.export import export
from treadle.models.pretrained import Loaded, load_run, tokenizer_of

PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "In 1815, 27 people walked 1,234.5 miles and", "Once upon a time there was a")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TEXTS = (*PROMPTS, "  spaces\t\tand\r\nlines ", "naïve 日本語 🙂 2024-11-27", "It's <|im_end|> inside.")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def their_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Loaded:
    return load_run(str(folder), "cpu")


@torch.no_grad()
def logits(model: Model, rows: torch.Tensor) -> torch.Tensor:
    return model(Batch.from_ids(rows)).logits


def rows_of(loaded: Loaded) -> list[torch.Tensor]:
    """Prompts, a conversation, and a row of 300 tokens."""
    tokenizer = tokenizer_of(loaded)
    assert tokenizer.chat_template is not None
    rows = [tokenizer.encode(text).tolist() for text in PROMPTS] + [tokenizer.chat_template.prompt_ids(tokenizer, QUESTION)]
    rows.append(tokenizer.encode(make_text(60)).tolist()[:300])
    return [torch.tensor([row]) for row in rows]


@torch.no_grad()
def test_logits_are_those_of_transformers(ours: Loaded, theirs: Any) -> None:
    *prompts, long = rows_of(ours)
    for row in prompts:
        torch.testing.assert_close(logits(ours.model, row), theirs(row).logits, atol=1e-4, rtol=0)
    # In a row of 300 tokens logits of up to 43 are rounded further apart: ours and theirs differ by up to 1.6e-4, ours is at most
    # 1.1e-4 and theirs 2.1e-4 from the same computation in fp64, with means of 1.0e-5 and 0.7e-5.
    found, wanted = logits(ours.model, long), theirs(long).logits
    exact = copy.deepcopy(theirs).double()(long).logits
    own, their = (found - exact).abs(), (wanted - exact).abs()
    assert float((found - wanted).abs().max()) < 3e-4 and float(own.max()) < 2e-4 and float(own.mean()) < 2 * float(their.mean())


@torch.no_grad()
def test_the_folder_holds_what_transformers_reads_in_the_file(theirs: Any, tmp_path: Path) -> None:
    """transformers' own reading of the .gguf file: the same weights bit for bit."""
    from transformers import AutoModelForCausalLM

    assert WHEEL is not None
    path = smollm2.gguf_of(WHEEL, tmp_path)
    direct = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state = theirs.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in direct.state_dict().items())


def test_greedy_tokens_are_those_of_transformers(ours: Loaded, theirs: Any) -> None:
    end = tokenizer_of(ours).eos_id
    for number, row in enumerate(rows_of(ours)[:5]):
        found = ours.model.generate(row, 20, temperature=0.0, eos_id=end)[0, row.shape[1] :].tolist()
        wanted = theirs.generate(row, max_new_tokens=20, do_sample=False)[0, row.shape[1] :].tolist()
        assert found == wanted and (len(found) == 20 or found[-1] == end)
        assert len(found) == 20 or number == 4  # the conversation's answer is shorter


def test_ids_are_those_of_transformers(ours: Loaded, their_tokenizer: Any) -> None:
    tokenizer = tokenizer_of(ours)
    assert tokenizer.chat_template is not None
    for text in TEXTS[:-1]:
        assert tokenizer.encode(text).tolist() == their_tokenizer(text)["input_ids"]
        assert tokenizer.decode(tokenizer.encode(text)) == text
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION, {"role": "assistant", "content": "Paris."}, *QUESTION]
    for conversation in (QUESTION, messages):
        wanted = their_tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert tokenizer.chat_template.prompt_ids(tokenizer, conversation) == wanted
    assert tokenizer.chat_template.stop_ids(tokenizer) == [their_tokenizer.eos_token_id]


def test_chat_answers_a_question(folder: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "treadle", "chat", str(folder), "--temperature", "0", "--max-new-tokens", "24", "--device", "cpu"],
        input="What is the capital of France?\n/quit\n", capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert said.returncode == 0 and said.stderr == "", said.stderr
    assert "Paris" in said.stdout and "<|im_end|>" not in said.stdout


def test_export_and_transformers_reads_the_same(folder: Path, ours: Loaded, theirs: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    written = export(str(folder), output=str(tmp_path / "again"), layout="huggingface")
    again, tokenizer = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32), AutoTokenizer.from_pretrained(written)
    with torch.no_grad():
        for row in rows_of(ours)[-2:]:
            assert torch.equal(again(row).logits, theirs(row).logits)
    wanted = tokenizer_of(ours).chat_template.prompt_ids(tokenizer_of(ours), QUESTION)  # type: ignore[union-attr]
    assert tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"] == wanted
    assert (written / "README.md").is_file()


def test_llama_cpp_continues_the_exported_file_as_treadle_does(folder: Path, ours: Loaded, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    path = export(str(folder), output=str(tmp_path / "model.gguf"), layout="gguf", gguf_type="f32", license="apache-2.0")
    judge, tokenizer, end = LlamaCpp(path, 512), tokenizer_of(ours), tokenizer_of(ours).eos_id
    for row in rows_of(ours)[:5]:
        wanted = ours.model.generate(row, 20, temperature=0.0, eos_id=end)[0, row.shape[1] :].tolist()
        found = judge.greedy(row[0].tolist(), 20)
        assert [token for token in found if token != end] == [token for token in wanted if token != end]
    for text in TEXTS:
        assert judge.tokenize(text) == tokenizer.encode(text).tolist()
    again = treadle.from_pretrained(path).named_weights()
    assert all(torch.equal(tensor, again[name]) for name, tensor in ours.model.named_weights().items())


def test_a_file_in_eight_bits_stays_near(folder: Path, ours: Loaded, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    path = export(str(folder), output=str(tmp_path / "model.gguf"), layout="gguf", gguf_type="q8_0")
    assert path.stat().st_size < 0.3 * (folder / "model.safetensors").stat().st_size
    judge = LlamaCpp(path, 512)
    for row in rows_of(ours)[:5]:
        wanted = logits(ours.model, row)[0, -1].log_softmax(-1)
        assert all(abs(log - float(wanted[token])) < 0.25 for token, log in judge.next(row[0].tolist(), 3).items())


def test_by_name_from_the_cache_of_the_hub(folder: Path, tmp_path: Path) -> None:
    name, line = "HuggingFaceTB/SmolLM2-135M-Instruct", ("--max_steps", "1", "--seq_len", "64", "--batch_size", "1", "--eval_rows", "1",
                                                        "--sample_tokens", "0", "--lora_rank", "2", "--validation_fraction", "0.2")  # fmt: skip
    with (tmp_path / "data.jsonl").open("w") as file:
        for number in range(20):
            file.write(json.dumps({"messages": [*QUESTION, {"role": "assistant", "content": f"Paris, {number}."}]}) + "\n")
    cache = tmp_path / "hub"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    out = command("train", "data.jsonl", "--objective", "sft", "--from", name, *line, cwd=tmp_path, timeout=900, **environment)
    assert out.returncode == 2 and f"hf download {name}" in out.stderr and out.stderr.count("\n") == 1, out.stderr
    home = cache / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("b" * 40)
    shutil.copytree(folder, home / "snapshots" / ("b" * 40), copy_function=os.link)
    out = command("train", "data.jsonl", "--objective", "sft", "--from", name, *line, cwd=tmp_path, timeout=1800, **environment)
    assert out.returncode == 0, out.stderr + out.stdout
