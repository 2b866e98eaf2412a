"""From a folder of transformers to a run and back, as a user types it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as T
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import treadle
from tests.conftest import make_text
from tests.models.huggingface.families import CASES, ids, their_logits, written
from tests.models.huggingface.test_loading import small, write_gguf
from treadle import cli
from treadle.models.pretrained import load_run


@dataclass
class Ended:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture()
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Ended]:
    """Runs a line in this process: a process of its own spends 5 s of CPU time on imports for each."""
    monkeypatch.chdir(tmp_path)

    def run(*line: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["treadle", *map(str, line)])
        capsys.readouterr()
        code = cli._run()
        return Ended(code, *capsys.readouterr())

    return run


def write_theirs(folder: Path, text: str) -> None:
    """A model that generates at most 7 tokens, greedily, with a tokenizer that begins texts with a token of its own."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.train_from_iterator([text], trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
                                                          initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))  # fmt: skip
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    T.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template="{{ messages }}").save_pretrained(folder)
    torch.manual_seed(0)
    model = T.Gemma2ForCausalLM(T.Gemma2Config(**{**CASES["gemma2"][1], "vocab_size": 320, "max_position_embeddings": 256, "bos_token_id": 0,
                                                  "eos_token_id": 1, "pad_token_id": None}))  # fmt: skip
    model.generation_config.max_new_tokens, model.generation_config.do_sample = 7, False
    model.save_pretrained(folder)


def test_train_from_a_folder_of_transformers_and_back(tmp_path: Path, command: Callable[..., Ended]) -> None:
    text = make_text(200)
    (tmp_path / "mydata.txt").write_text(text)
    write_theirs(tmp_path / "theirs", text)

    def ok(*line: object) -> str:
        out = command(*line)
        assert out.returncode == 0, out.stderr + out.stdout
        return out.stdout

    shown = ok("generate", "theirs", "--prompt", "The wheel")
    theirs, tokens = T.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"), T.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    prompt = tokens("The wheel", return_tensors="pt").input_ids
    assert int(prompt[0, 0]) == 0
    new = theirs.generate(prompt, eos_token_id=1)[0, prompt.shape[1] :]
    assert shown.strip("\n") == ("The wheel" + tokens.decode(new, skip_special_tokens=True)).rstrip("\ufffd").strip("\n")
    assert "loss" in ok("eval", "theirs", "--data", "mydata.txt", "--rows", 2, "--samples", 0)
    out = command("eval", "theirs")
    assert out.returncode == 2 and "--data FILE" in out.stderr
    assert not (tmp_path / "theirs" / "results").exists() and not (tmp_path / "results").exists()
    assert "parameters" in ok("plan", "mydata.txt", "--from", "theirs")
    shown = ok("train", "mydata.txt", "--from", "theirs", "--max_steps", 6, "--batch_size", 2, "--seq_len", 48, "--sample_tokens", 4,
               "--learning_rate", "3e-3", "--attention_backend", "math")  # fmt: skip
    assert "Weights from theirs" in shown and "attention math" in shown
    assert 'attention_backend = "math"' in (tmp_path / "runs" / "mydata" / "config.toml").read_text()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "runs/mydata/metrics.jsonl").read_text().splitlines() if "grad_norm" in line]
    assert losses[-1] < losses[0]
    assert "AutoModelForCausalLM" in ok("export", "runs/mydata", "--format", "huggingface")
    back = tmp_path / "runs" / "mydata" / "huggingface"
    again, ours = T.AutoModelForCausalLM.from_pretrained(back), load_run(str(tmp_path / "runs" / "mydata"))
    assert again.config.model_type == "gemma2" and again.generation_config.max_new_tokens == 7 and again.config.eos_token_id == 1
    rows = ids(2, 30)
    torch.testing.assert_close(their_logits(again, rows), their_logits_of_ours(ours.model, rows), atol=1e-4, rtol=0)
    tokens_back = T.AutoTokenizer.from_pretrained(back)
    assert tokens_back.chat_template == "{{ messages }}" and tokens_back.bos_token == "<s>"
    assert tokens_back("She had").input_ids == tokens("She had").input_ids
    assert ok("generate", str(back), "--prompt", "The wheel").startswith("The wheel")


@torch.no_grad()
def their_logits_of_ours(model: treadle.Model, rows: torch.Tensor) -> torch.Tensor:
    logits = model(treadle.Batch.from_ids(rows)).logits
    assert logits is not None
    return logits


def test_a_gguf_file_with_a_tokenizer_beside_it(tmp_path: Path, command: Callable[..., Ended]) -> None:
    write_theirs(tmp_path, make_text(50))
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / name).unlink()
    write_gguf(tmp_path / "small.gguf", small("Llama", vocab_size=320))
    out = command("generate", "small.gguf", "--prompt", "The", "--max-tokens", 3, "--greedy")
    assert out.returncode == 0 and out.stdout.startswith("The"), out.stderr
    out = command("export", "small.gguf", "--format", "hf", "--output", "folder")
    assert out.returncode == 0, out.stderr
    assert T.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").config.model_type == "llama"


def test_samples_of_a_model_of_short_rows_are_shortened(tmp_path: Path) -> None:
    """Learned positions end with their table; a sample that does not fit used to end the training."""
    (tmp_path / "text.txt").write_text(make_text(60))
    summary = treadle.train(str(tmp_path / "text.txt"), quiet=True, max_steps=2, batch_size=2, seq_len=24, eval_steps=1, sample_tokens=100,
                            sample_prompt="She had", output_dir=str(tmp_path / "run"), tokenizer={"name": "byte"},
                            model={"style": "gpt2", "hidden_size": 32, "num_layers": 1, "num_heads": 2, "max_position_embeddings": 24})  # fmt: skip
    assert summary["step"] == 2
    sample = next(iter(sorted((tmp_path / "run" / "samples").iterdir()))).read_text()
    assert "She had" in sample
    from treadle.evaluation.report import evaluate_run

    assert evaluate_run(str(tmp_path / "run"), samples=2, rows=2)["samples"]


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path: Path, command: Callable[..., Ended]) -> None:
    (tmp_path / "text.txt").write_text(make_text(60))
    folder = written("llama")[1]
    for line in (("generate", folder, "--prompt", "x"), ("train", "text.txt", "--from", folder, "--max_steps", 1)):
        out = command(*line)
        assert out.returncode == 2 and "tokenizer" in out.stderr and len(out.stderr.splitlines()) == 1, out.stderr


def test_the_tokenizer_of_a_folder_survives_training(tmp_path: Path) -> None:
    write_theirs(tmp_path, make_text(50))
    made = treadle.Tokenizer.load(tmp_path)
    made.save(tmp_path / "saved")
    back = treadle.Tokenizer.load(tmp_path / "saved")
    assert back.fingerprint() == made.fingerprint() and back.bos_id == 0 and back.eos_id == 1
    assert np.array_equal(back.encode("She had"), made.encode("She had")) and made.prompt_ids("She had") == made.encode("She had").tolist()
    described = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert described["bos_token"] == "<s>" and (tmp_path / "saved" / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize(("name", "works"), [("math", True), ("flash", True), ("efficient", False), ("cudnn", False)])
def test_attention_backends_of_a_cpu(name: str, works: bool) -> None:
    from treadle.errors import ConfigError
    from treadle.ops.attention import attention_backend, causal_attention, check_backend

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 20, 16) for heads in (4, 2, 2))
    wanted = causal_attention(q, k, v)
    if not works:
        with pytest.raises(ConfigError, match=f"attention_backend = {name}"):
            check_backend(name, torch.device("cpu"), torch.float32)
        return
    assert check_backend(name, torch.device("cpu"), torch.float32) == name
    with attention_backend(name):
        torch.testing.assert_close(causal_attention(q, k, v), wanted, atol=1e-5, rtol=1e-5)
        documents = torch.tensor([[0] * 8 + [1] * 12] * 2)
        torch.testing.assert_close(causal_attention(q, k, v, doc_ids=documents, segments=((8, 12),) * 2)[:, :, :8], wanted[:, :, :8], atol=1e-5, rtol=1e-5)
