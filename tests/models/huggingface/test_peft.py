"""Adapters to and from the package peft, on models of transformers' own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

import treadle
from tests.conftest import make_text
from tests.models.huggingface.families import ids, their_logits, their_model, written
from tests.models.huggingface.test_command_line import write_theirs
from treadle import cli
from treadle.checkpoint.tensors import write_tensors
from treadle.data.batch import Batch
from treadle.errors import CheckpointError, ConfigError, InputError, ShapeError
from treadle.models.adapters import add_adapters, load_base, merge
from treadle.models.huggingface.peft import CONFIG, WEIGHTS, for_peft
from treadle.models.huggingface.reading import TransformersFolder
from treadle.models.pretrained import generation_defaults, load_run, locate
from treadle.models.settings import AdapterSettings
from treadle.models.transformer import Transformer

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
ROWS = ids(2, 40)


def randomised(parameters: Any, seed: int = 3) -> None:
    """B would be 0, so that the adapter changed nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters:
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def written_by_peft(family: str, folder: Path, **keys: Any) -> torch.Tensor:
    """Saves an adapter with random numbers; returns the logits of ROWS with it."""
    _, base = written(family)
    model = their_model(family)
    model.name_or_path = str(base)
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5, **keys})
    adapted = peft.get_peft_model(model, config).eval()
    randomised(adapted.named_parameters())
    adapted.save_pretrained(folder)
    return their_logits(adapted, ROWS)


def our_logits(folder: str | Path) -> torch.Tensor:
    with torch.no_grad():
        logits = load_run(str(folder), "cpu", tokenizer=False).model(Batch.from_ids(ROWS)).logits
    assert logits is not None
    return logits


@pytest.mark.parametrize("family", ["llama", "smollm", "gemma2", "phi3", "gpt2", "qwen3"])
def test_an_adapter_of_peft_s_is_read(family: str, tmp_path: Path) -> None:
    theirs = written_by_peft(family, tmp_path / "adapter", target_modules="all-linear")
    ours = our_logits(tmp_path / "adapter")
    assert not torch.allclose(ours, their_logits(written(family)[0], ROWS), atol=0.1), "the adapter changes nothing"
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("keys", [
    {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6},
     "alpha_pattern": {"v_proj": 1, "layers.0.self_attn.q_proj": 11}},
    {"target_modules": r".*\.1\.mlp\..*_proj", "lora_dropout": 0.3},
    {"target_modules": ["lm_head", "k_proj"]},
], ids=["rslora", "patterns", "expression", "head"])  # fmt: skip
def test_what_a_configuration_says_is_kept_to(keys: dict[str, Any], tmp_path: Path) -> None:
    theirs = written_by_peft("llama", tmp_path / "adapter", **keys)
    torch.testing.assert_close(our_logits(tmp_path / "adapter"), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "keys"), [
    ("llama", {}), ("llama", {"lora_targets": ["query", "layers.1.mlp.*"], "use_rslora": True, "lora_dropout": 0.1}),
    ("gpt2", {"lora_alpha": 7.0}), ("gpt2", {"lora_targets": ["query", "value", "mlp.up"], "use_rslora": True}), ("phi3", {"lora_targets": ["key", "gate"]}),
    ("smollm", {"lora_targets": ["q_proj"]}),
])  # fmt: skip
def test_peft_reads_what_is_written_and_so_do_we(family: str, keys: dict[str, Any], tmp_path: Path) -> None:
    _, base = written(family)
    settings = AdapterSettings(lora_rank=2, **keys)
    foreign = TransformersFolder(base)
    model = Transformer(foreign.config)
    add_adapters(model, settings)
    load_base(model, foreign.tensors("model"))
    randomised(model.named_parameters())
    table, tensors = for_peft(model.config, {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}, settings, str(base))
    (tmp_path / CONFIG).write_text(json.dumps(table))
    write_tensors(tmp_path / WEIGHTS, tensors, {"format": "pt"})
    model.eval()
    with torch.no_grad():
        ours = model(Batch.from_ids(ROWS)).logits
    assert ours is not None
    adapted = peft.PeftModel.from_pretrained(their_model(family), str(tmp_path)).eval()
    torch.testing.assert_close(their_logits(adapted, ROWS), ours, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(our_logits(tmp_path), ours, atol=1e-4, rtol=1e-4)
    merge(model)
    with torch.no_grad():
        assert torch.allclose(model(Batch.from_ids(ROWS)).logits, ours, atol=1e-5)  # type: ignore[arg-type]


def test_names_are_short_where_they_mean_the_same(tmp_path: Path) -> None:
    model = Transformer(TransformersFolder(written("llama")[1]).config)
    named = {f"{n}.lora_{x}": torch.zeros(2, 2) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) for x in "AB"}

    def targets(*wanted: str) -> list[str]:
        chosen = {n: t for n, t in named.items() if any(w in n for w in wanted)}
        found: list[str] = for_peft(model.config, chosen, AdapterSettings(lora_rank=2), "base")[0]["target_modules"]
        return found

    assert targets("query", "mlp.down") == ["down_proj", "q_proj"]
    assert targets("layers.1.attention.value") == ["1.self_attn.v_proj"]


def changed(folder: Path, **keys: Any) -> None:
    table = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**table, **keys}))


def test_what_is_not_computed_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    written_by_peft("llama", folder, target_modules=["q_proj"])
    for keys in ({"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"peft_type": "LOHA"}, {"init_lora_weights": "pissa"}):
        before = (folder / CONFIG).read_text()
        changed(folder, **keys)
        with pytest.raises(ConfigError, match=f"{next(iter(keys))}.*merge_and_unload"):
            locate(str(folder))
        (folder / CONFIG).write_text(before)
    changed(folder, base_model_name_or_path=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"nowhere.*base_model_name_or_path"):
        locate(str(folder))
    changed(folder, base_model_name_or_path=str(written("smollm")[1]))
    with pytest.raises(ShapeError, match="belongs to another model"):
        load_run(str(folder), "cpu", tokenizer=False)
    changed(folder, base_model_name_or_path=None)
    with pytest.raises(InputError, match="names no base model"):
        locate(str(folder))


def test_a_tied_head_and_a_damaged_file(tmp_path: Path) -> None:
    written_by_peft("smollm", tmp_path / "head", target_modules=["lm_head"])
    with pytest.raises(ConfigError, match="shares with its embedding"):
        load_run(str(tmp_path / "head"), "cpu", tokenizer=False)
    written_by_peft("llama", tmp_path / "cut", target_modules=["q_proj"])
    (tmp_path / "cut" / WEIGHTS).write_bytes((tmp_path / "cut" / WEIGHTS).read_bytes()[:-40])
    with pytest.raises(CheckpointError):
        load_run(str(tmp_path / "cut"), "cpu", tokenizer=False)




# ---- as a user types it ----

FEW = "--seq_len 32 --batch_size 2 --sample_tokens 0 --eval_steps 100"


def typed(folder: Path, line: str) -> int:
    """The exit code of a command in this process, typed in a folder."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(sys, "argv", ["treadle", *line.split()])
        return cli._run()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base of transformers', text, run `adapted` with adapters on it, and those in peft's format."""
    folder = tmp_path_factory.mktemp("adapted")
    write_theirs(folder / "base", make_text(400))
    (folder / "text.txt").write_text(make_text(400))
    assert typed(folder, f"train text.txt --from base --output_dir adapted --lora_rank 4 --max_steps 3 --learning_rate 0.05 {FEW}") == 0
    assert typed(folder, "export adapted") == 0
    return folder


def answered(folder: Path, run: str) -> torch.Tensor:
    with torch.no_grad():
        logits = load_run(str(folder / run), "cpu").model(Batch.from_ids(ROWS)).logits
    assert logits is not None
    return logits


def test_what_is_exported_is_what_was_trained(trained: Path) -> None:
    ours, before = answered(trained, "adapted"), answered(trained, "base")
    assert not torch.allclose(ours, before, atol=0.05)
    torch.testing.assert_close(answered(trained, "adapted/peft"), ours, atol=1e-5, rtol=0)
    assert (trained / "adapted/peft" / WEIGHTS).stat().st_size < 0.6 * (trained / "base" / "model.safetensors").stat().st_size
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(trained / "adapted/peft")).eval()
    torch.testing.assert_close(their_logits(theirs, ROWS), ours, atol=1e-4, rtol=1e-4)
    for flags, made in (("--merge", "export"), ("--format huggingface", "huggingface"), ("--format treadle --output adapted/t", "t")):
        assert typed(trained, f"export adapted {flags}") == 0
        torch.testing.assert_close(answered(trained, f"adapted/{made}"), ours, atol=1e-5, rtol=0)
    whole = T.AutoModelForCausalLM.from_pretrained(str(trained / "adapted/huggingface")).eval()
    torch.testing.assert_close(their_logits(whole, ROWS), ours, atol=1e-4, rtol=1e-4)
    assert typed(trained, "export adapted/peft --output again") == 0
    assert torch.equal(answered(trained, "again"), answered(trained, "adapted/peft"))


def test_an_adapter_is_used_like_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for run in ("adapted", "adapted/peft"):
        assert typed(trained, f"generate {run} --prompt the --temperature 0 --max_new_tokens 5") == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and len(said[0]) > 4
    assert treadle.from_pretrained(trained / "adapted/peft").parameter_count() == treadle.from_pretrained(trained / "base").parameter_count()
    assert generation_defaults(trained / "adapted/peft") == generation_defaults(trained / "base") != {}
    assert typed(trained, "eval adapted/peft --data text.txt --rows 2 --samples 0") == 0
    assert not (trained / "adapted" / "results").exists(), "nothing is written beside a folder that may be somebody else's"
    # New adapters above those, and the whole model with them merged.
    for name, more in (("above", "--lora_rank 2"), ("whole", "")):
        assert typed(trained, f"train text.txt --from adapted/peft --output_dir {name} --max_steps 1 --learning_rate 1e-9 {FEW} {more}") == 0
        torch.testing.assert_close(answered(trained, name), answered(trained, "adapted/peft"), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("line", "words"), [
    ("export base --format peft --output x", "no adapters"), ("export adapted --format peft --merge", "leave it out to merge"),
    ("export adapted/peft --format peft --output x", "no adapters"), ("export adapted/peft", "--output FOLDER"),
])  # fmt: skip
def test_what_does_not_go_together(trained: Path, line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(trained, line) == 2
    assert words in capsys.readouterr().err


def test_a_run_of_ours_is_named_as_the_base(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = "--model.arch shc --model.hidden_size 32 --model.num_layers 1 --model.num_heads 2"
    assert typed(trained, f"train text.txt --output_dir plain --max_steps 1 {FEW} {shape}") == 0
    assert typed(trained, f"train text.txt --from plain --output_dir on_plain --lora_rank 2 --max_steps 2 --learning_rate 0.05 {FEW}") == 0
    capsys.readouterr()
    assert typed(trained, "export on_plain") == 0
    assert "note: peft needs the model" in capsys.readouterr().out
    torch.testing.assert_close(answered(trained, "on_plain/peft"), answered(trained, "on_plain"), atol=1e-5, rtol=0)
