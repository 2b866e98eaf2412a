"""Supervised fine-tuning: the loss is that of the learnt tokens alone, in any packing, and whole runs keep every guarantee."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import treadle
from tests.conftest import flags, make_text
from tests.conftest import treadle as command
from tests.several import run_in
from tests.training.test_resume import same_end, start
from treadle.data.conversations import Conversations
from treadle.data.dataset import splits_of
from treadle.data.settings import DataSettings
from treadle.errors import ConfigError
from treadle.generation.answers import answer_to
from treadle.objectives.fine_tuning import FineTuning
from treadle.recipe import Layer, compose
from treadle.text.base import Tokenizer
from treadle.text.chat_template import ChatTemplate
from treadle.text.settings import TokenizerSettings
from treadle.training.trainer import Trainer

ROWS = 40
KEYS = {"objective": "sft", "seq_len": 96, "max_steps": 12, "batch_size": 4, "save_steps": 4, "eval_steps": 6, "validation_fraction": 0.2,
        "precision": "fp32", "chat_template": "chatml", "eval_rows": 100}  # fmt: skip


def messages(n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}" + "!" * (n % 4)}]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations, and a run on a text to start from."""
    folder = tmp_path_factory.mktemp("sft")
    (folder / "conversations.jsonl").write_text("".join(json.dumps({"messages": messages(n)}) + "\n" for n in range(ROWS)))
    (folder / "story.txt").write_text(make_text())
    out = command("train", folder / "story.txt", "--output_dir", folder / "base", *flags(max_steps=4, eval_steps=4))
    assert out.returncode == 0, out.stderr
    return folder


def data_of(files: Path, **keys: Any) -> Conversations:
    wanted = {"seq_len": 96, "validation_fraction": 0.0, "chat_template": "chatml", **keys}
    found = splits_of(DataSettings(path=str(files / "conversations.jsonl"), dataset_class="conversations", **wanted), TokenizerSettings(name="byte"))
    made = found["train"]
    assert isinstance(made, Conversations)
    return made


def model(arch: str = "transformer") -> Any:
    return treadle.build(arch, seed=1, hidden_size=32, num_layers=2, num_heads=2, vocab_size=256)


def plain_sum(made: Any, tokenizer: Tokenizer) -> tuple[float, int]:
    """(nats, tokens) over all conversations, each alone, from the logits and the mask of the template."""
    nats, count = 0.0, 0
    for n in range(ROWS):
        ids, mask = ChatTemplate.named("chatml").encode(tokenizer, messages(n))
        whole = torch.tensor(ids.tolist())
        logits = made(treadle.Batch.from_ids(whole[None])).logits[0, :-1].double()
        each = F.cross_entropy(logits, whole[1:], reduction="none")
        learnt = torch.tensor(mask.tolist())[1:]
        nats, count = nats + float(each[learnt].sum()), count + int(learnt.sum())
    return nats, count


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("arch", ["transformer", "ssm"])
@torch.no_grad()
def test_the_loss_is_that_of_each_conversation_alone(arch: str, packing: str, files: Path) -> None:
    made, data, objective = model(arch).eval(), data_of(files, packing=packing), FineTuning()
    nats, count = plain_sum(made, data.tokenizer)
    for size in (1, 3, 64):  # however rows meet in micro-batches, the sums are the same
        batches = list(data.in_sequence(size))
        terms = [objective(made, batch).losses["next_token"] for batch in batches]
        assert sum(objective.counts(batch)["labels"] for batch in batches) == count and {term.unit for term in terms} == {"labels"}
        assert sum(float(term.total) for term in terms) / count == pytest.approx(nats / count, abs=1e-6)
    sums = [objective.evaluation_sums(made, batch) for batch in data.in_sequence(3)]
    whole = objective.compute_metrics({name: sum(float(one[name]) for one in sums) for name in sums[0]})
    assert whole["loss"] == pytest.approx(nats / count, abs=1e-6) and whole["labels"] == count


def test_objectives_imply_their_data() -> None:
    for objective, kind in (("sft", "conversations"), ("SFT", "conversations"), ("dpo", "preferences"), ("next_token", "text")):
        assert compose([Layer({"objective": objective}, "test")]).data.dataset_class == kind
    assert compose([Layer({"objective": "sft", "data.dataset": "preferences"}, "test")]).data.dataset_class == "preferences"
    for table, key, value in (({"assistant_only_loss": True}, "train_on", "assistant"), ({"completion_only_loss": True}, "train_on", "completion"),
                              ({"completion_only_loss": False}, "train_on", "all")):  # fmt: skip
        assert getattr(compose([Layer({"objective": "sft", **table}, "test")], with_model=False).data, key) == value
    both = compose([Layer({"objective": "sft", "assistant_only_loss": "false", "completion_only_loss": "true"}, "flag", from_text=True)])
    assert both.data.train_on == "completion"
    none = compose([Layer({"objective": "sft", "assistant_only_loss": "false"}, "flag", from_text=True)])
    assert none.data.train_on == "all"


def test_a_model_that_mixes_documents_wants_rows_of_their_own(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    monkeypatch.setattr(type(made), "capabilities", treadle.Capabilities(packs=False))
    with pytest.raises(ConfigError, match="--packing none"):
        FineTuning().prepare(made, data_of(files), torch.device("cpu"))
    FineTuning().prepare(made, data_of(files, packing="none"), torch.device("cpu"))


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_it_learns_to_answer_and_to_stop(template: str, tmp_path: Path) -> None:
    """Two conversations by heart: the answers are whole and end by themselves (trl's pull request 5988 repairs one that never does)."""
    said = {"Who?": "Emma.", "Where?": "At home"}
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in said.items()]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = splits_of(DataSettings(path=str(tmp_path / "two.jsonl"), dataset_class="conversations", seq_len=80, validation_fraction=0.0,
                                  chat_template=template, packing="none"), TokenizerSettings(name="byte"))["train"]  # fmt: skip
    made = model()
    config = treadle.TrainConfig(output_dir=str(tmp_path / "run"), max_steps=70, batch_size=2, lr=1e-2, precision="fp32", report_to=["jsonl"])
    Trainer(made, data, None, config, FineTuning()).train()
    tokenizer = data.tokenizer
    assert tokenizer is not None and tokenizer.chat_template is not None
    for question, answer in said.items():
        prompt = tokenizer.chat_template.prompt_ids(tokenizer, [{"role": "user", "content": question}])
        assert answer_to(made, tokenizer, prompt, 40, temperature=0.0) == answer
    assert FineTuning().samples(made, data, 2)[0][0]["prompt"].rstrip().lower().endswith("assistant" if template == "chatml" else "assistant:")


def test_the_command_as_it_is_typed(files: Path, tmp_path: Path) -> None:
    for name in ("conversations.jsonl", "base"):
        (tmp_path / name).symlink_to(files / name)
    out = command("train", "conversations.jsonl", "--from", "base", "--objective", "sft", "--chat_template", "chatml", "--lora_rank", "8",
                  "--max_steps", "3", "--sample_tokens", "5", "--validation_fraction", "0.2", cwd=tmp_path)  # fmt: skip
    assert out.returncode == 0, out.stderr
    run = tmp_path / "runs" / "conversations"
    assert "conversation(s)" in out.stdout and "chat template chatml" in out.stdout
    config = tomllib.loads((run / "config.toml").read_text())
    assert config["data"]["dataset_class"] == "conversations" and config["train"]["objective"] == "sft"
    assert (run / "samples" / "step-00000003.txt").read_text().startswith("<|im_start|>user\nSay ")
    (checkpoint,) = sorted((run / "checkpoints").glob("step-*3"))
    for place in (run, checkpoint):
        assert "<|im_start|>" in (place / "tokenizer" / "chat_template.jinja").read_text()


def test_what_is_learnt_from_its_first_token_on_has_a_sample_too(files: Path, tmp_path: Path) -> None:
    """--train_on all, and rows of text: no prompt of the held-out rows is left to answer."""
    rows = [{"text": f"Once upon a time {n}."} for n in range(ROWS)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, path in (("all", files / "conversations.jsonl"), ("assistant", tmp_path / "texts.jsonl")):
        keys = {**KEYS, "max_steps": 2, "eval_steps": 2, "train_on": name, "sample_tokens": 3}
        out = command("train", path, "--output_dir", tmp_path / name, *flags(**keys))
        assert out.returncode == 0, out.stderr
        assert (tmp_path / name / "samples" / "step-00000002.txt").read_text()
        out = command("eval", tmp_path / name, "--samples", 1)
        assert out.returncode == 0, out.stderr


def test_a_run_is_exported_with_its_template_and_evaluated_elsewhere(files: Path, tmp_path: Path) -> None:
    run = tmp_path / "r"
    out = command("train", files / "conversations.jsonl", "--output_dir", run, *flags(**{**KEYS, "max_steps": 2, "eval_steps": 2}))
    assert out.returncode == 0, out.stderr
    assert command("export", run, "--output", tmp_path / "export").returncode == 0
    assert Tokenizer.load(tmp_path / "export" / "tokenizer").chat_template == ChatTemplate.named("chatml")
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "Say 3.", "completion": "3"}) + "\n")
    (tmp_path / "text.txt").write_text("text\n")
    measured = command("eval", run, "--data", tmp_path / "other.jsonl")
    assert measured.returncode == 0, measured.stderr
    report = json.loads((run / "results" / "evaluation_results.json").read_text())
    assert report["metrics"]["labels"] == len("3<|im_end|>") and report["samples"][0]["prompt"].startswith("<|im_start|>user\nSay 3.")
    again = command("train", tmp_path / "other.jsonl", "--from", run, "--objective", "sft", "--output_dir", tmp_path / "next", "--max_steps", "1",
                    "--report_to", "jsonl")  # fmt: skip
    assert again.returncode == 0 and "chat template chatml" in again.stdout, again.stderr  # the one of the run it starts from


def test_a_hugging_face_folder_brings_its_template_and_takes_it_along(files: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.text.test_chat_template import CONTROL, TEXT, UNMARKED

    made = Tokenizer.train("bpe", iter([TEXT]), 300)
    made.inner.add_special_tokens(CONTROL)  # type: ignore[attr-defined]
    tokens = transformers.PreTrainedTokenizerFast(tokenizer_object=made.inner, eos_token="<|im_end|>", chat_template=UNMARKED)  # type: ignore[attr-defined]
    tokens.save_pretrained(tmp_path / "theirs")
    shape = transformers.LlamaConfig(vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    transformers.LlamaForCausalLM(shape).save_pretrained(tmp_path / "theirs")
    out = command("train", files / "conversations.jsonl", "--from", tmp_path / "theirs", "--objective", "sft", "--max_steps", "2", "--seq_len", "96",
                  "--output_dir", tmp_path / "r", "--validation_fraction", "0.2", "--eval_rows", "4", "--report_to", "jsonl")  # fmt: skip
    assert out.returncode == 0 and "chat template the tokenizer's" in out.stdout, out.stdout + out.stderr
    exported = command("export", tmp_path / "r", "--format", "huggingface", "--output", tmp_path / "back")
    assert exported.returncode == 0, exported.stderr
    back, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "back"), Tokenizer.load(tmp_path / "back")
    assert back.chat_template == UNMARKED and ours.chat_template == ChatTemplate(UNMARKED)
    wanted = back.apply_chat_template(messages(3), tokenize=True)["input_ids"]
    assert ours.chat_template is not None and ours.chat_template.encode(ours, messages(3))[0].tolist() == wanted


def test_killed_it_continues_bit_for_bit(files: Path, tmp_path: Path) -> None:
    source = tmp_path / "talk.jsonl"
    shutil.copy(files / "conversations.jsonl", source)
    line = ["train", source, *flags(**KEYS)]
    whole = command(*line, "--output_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    process = start([sys.executable, "-m", "treadle", *map(str, line), "--output_dir", str(tmp_path / "killed")])
    log, deadline = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline and not (log.exists() and log.read_bytes().count(b"\n") >= 6):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    again = command(*line, "--output_dir", tmp_path / "killed")
    assert again.returncode == 0, again.stderr
    same_end(tmp_path / "whole", tmp_path / "killed", 12)
    for words in (["--train_on", "all"], ["--chat_template", "plain"]):
        refused = command(*line, "--output_dir", tmp_path / "killed", *words)
        assert refused.returncode == 2 and words[0][2:] in refused.stderr
    source.write_text(source.read_text().replace('"Say 3."', '"Say three."'))
    refused = command(*line, "--output_dir", tmp_path / "killed")
    assert refused.returncode == 2 and "not what this run was started with" in refused.stderr


def losses(files: str, folder: str, accumulation: int) -> list[float]:
    """Of three steps of four rows, whoever computes them."""
    config = treadle.TrainConfig(output_dir=folder, max_steps=3, global_batch_size=4, batch_size=4 // accumulation, precision="fp32", lr=1e-3,
                                 report_to=["jsonl"], logging_steps=1)  # fmt: skip
    Trainer(model(), data_of(Path(files), packing="next_fit"), None, config, FineTuning()).train()
    log = Path(folder, "metrics.jsonl")
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()] if log.exists() else []


def test_processes_and_micro_batches_change_nothing(files: Path, tmp_path: Path) -> None:
    alone = losses(str(files), str(tmp_path / "alone"), 1)
    assert losses(str(files), str(tmp_path / "micro"), 4) == pytest.approx(alone, abs=1e-5)
    together = run_in(2, losses, str(files), str(tmp_path / "two"), 2)
    assert together[0] == pytest.approx(alone, abs=1e-5)
