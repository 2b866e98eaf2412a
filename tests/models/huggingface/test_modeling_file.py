"""Exports that transformers loads with their own modeling file, in a process without treadle: the same logits and the same text."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.huggingface.own_model import Mine
from tests.models.huggingface.own_public import Mean
from treadle import Batch, Capabilities, build, from_pretrained
from treadle.errors import ConfigError
from treadle.models.base import Model, ModelConfig
from treadle.models.export import save_for_transformers
from treadle.models.huggingface.bundled_source import Place
from treadle.models.huggingface.bundling import Bundle, source_of
from treadle.models.huggingface.modeling_file import modeling_file
from treadle.text.byte import ByteTokenizer

pytest.importorskip("transformers", reason="the extra hf is not installed")

VOCABULARY, WIDTH = 61, {"hidden_size": 32, "num_heads": 4, "intermediate_size": 64}
MIXERS = ["retnet", "mamba2", "gated_deltanet", "rwkv", "linear_attention", "hgrn", "block_sparse", "local"]
SHAPES: dict[str, tuple[str | type[Model], dict[str, Any]]] = {
    "shc": ("shc", {**WIDTH, "num_layers": 2, "num_kv_heads": 2}),
    "shc_latent": ("shc", {**WIDTH, "num_layers": 2, "latent_size": 8, "routing": "sinkhorn", "num_streams": 2, "tie_embeddings": False}),
    "ssm": ("ssm", {**WIDTH, "num_layers": 2, "num_kv_heads": 2}),
    "hgrn_bit": ("hgrn_bit", {"hidden_size": 32, "num_layers": 2, "lower_bound": True, "convolution_size": 4}),
    "hgrn": ("hgrn_bit", {"hidden_size": 32, "num_layers": 2, "ternary": False, "tie_embeddings": True}),
    "hnet": ("hnet", {"hidden_sizes": [32, 48], "token_mixers": [["hgrn_bit", "attention", "ssm"], "hgrn_bit"], "num_blocks": [[3, 0, 1], [2]]}),
    "inl": ("inl", {**WIDTH, "num_layers": 2, "dynamics_controller_size": 8}),
    "mixers": ("transformer", {**WIDTH, "num_layers": 8, "layer_types": MIXERS, "sliding_window": 6}),
    "own": (Mine, {"hidden_size": 32}),
    "own_public": (Mean, {"hidden_size": 32}),
    "post_norm": ("transformer", {**WIDTH, "num_layers": 2, "style": "gpt2", "pre_norm": False, "max_position_embeddings": 64}),
}  # fmt: skip

# What the other process does with each folder; treadle cannot be imported there.
THEIRS = r"""
import json, sys, warnings
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "treadle":
            raise ImportError("no treadle here")
sys.meta_path.insert(0, Absent())
warnings.simplefilter("ignore")
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
def gap(model, given):
    return float((model(given["ids"], attention_mask=torch.ones_like(given["ids"])).logits - given["logits"]).abs().max())
for folder in sys.argv[1:]:
    given, model, found = load_file(f"{folder}/given.safetensors"), load(folder).eval(), {}
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        found["logits"] = gap(model, given)
        prompt, mask = given["ids"][:, :9], given["mask"]
        found["greedy"] = bool(torch.equal(model.generate(prompt, attention_mask=torch.ones_like(mask), **greedy), given["greedy"]))
        found["padded"] = bool(torch.equal(model.generate(prompt, attention_mask=mask, **greedy), given["padded"]))
        beams = [model.generate(prompt, attention_mask=mask, num_beams=2, use_cache=cached, **greedy) for cached in (True, False)]
        found["beams"] = bool(torch.equal(*beams))
        first = model(given["ids"][:, :16], use_cache=True)
        rest = model(given["ids"][:, 16:], **{name: value for name, value in first.items() if name in ("cache", "past_key_values")})
        found["continued"] = float((rest.logits - given["logits"][:, 16:]).abs().max())
        found["last"] = list(model(prompt, logits_to_keep=1).logits.shape)
    model.save_pretrained(f"{folder}/again")
    with torch.no_grad():
        found["again"] = gap(load(f"{folder}/again").eval(), given)
    model.train().gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(given["ids"], labels=given["ids"]).loss
        loss.backward()
        found["finite"] = all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())
        optimizer.step(); optimizer.zero_grad()
        losses.append(float(loss))
    found["losses"] = losses
    found["fresh"] = float(AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)(given["ids"], labels=given["ids"]).loss)
    print("FOUND " + json.dumps([folder.rpartition("/")[2], found]))
"""

def make(name: str) -> Model:
    arch, keys = SHAPES[name]
    return build(arch, vocab_size=VOCABULARY, **keys).eval()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the other process says of each shape."""
    home = tmp_path_factory.mktemp("exports")
    for name in SHAPES:
        model, rows = make(name), torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
        save_for_transformers(model, home / name)
        mask = torch.ones(2, 9, dtype=torch.int64)
        mask[0, :3] = 0
        with torch.no_grad():
            logits = model(Batch.from_ids(rows)).logits
        greedy = model.generate(rows[:, :9], 6, temperature=0)
        padded = model.generate(rows[:, :9], 6, temperature=0, attention_mask=mask)
        assert logits is not None
        save_file({"ids": rows.contiguous(), "logits": logits, "mask": mask, "greedy": greedy, "padded": padded}, home / name / "given.safetensors")
    environment = {**os.environ, "HF_HOME": str(home / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", THEIRS, *(str(home / name) for name in SHAPES)], cwd=home, env=environment, capture_output=True,
                          text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(line.removeprefix("FOUND ")) for line in done.stdout.splitlines() if line.startswith("FOUND "))


@pytest.mark.parametrize("name", SHAPES)
def test_without_treadle_it_computes_the_same(name: str, found: dict[str, dict[str, Any]]) -> None:
    told = found[name]
    assert told["logits"] < 1e-5 and told["again"] < 1e-5 and told["continued"] < 1e-5
    assert told["greedy"] and told["padded"] and told["beams"]
    assert told["last"] == [2, 1, VOCABULARY]
    assert told["finite"] and told["losses"][-1] < told["losses"][0]
    assert 3.5 < told["fresh"] < 5.5  # about log(61)


@pytest.mark.parametrize("name", ["hgrn_bit"])
def test_treadle_reads_it_back_without_its_code(name: str, tmp_path: Path) -> None:
    model = make(name)
    save_for_transformers(model, tmp_path)
    for path in tmp_path.glob("modeling_*.py"):
        path.write_text("raise SystemExit('never run')\n")
    again = from_pretrained(tmp_path)
    assert type(again) is type(model)
    for (own, a), (_, b) in zip(model.named_weights().items(), again.named_weights().items()):
        assert torch.equal(a, b), own
    table = load_file(tmp_path / "model.safetensors")
    save_file({**table, "model.other.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(Exception, match=r"model\.other\.weight"):
        from_pretrained(tmp_path)


def test_the_file_is_whole_readable_and_equal_every_time() -> None:
    model = make("mixers")
    text = modeling_file(type(model), model.config)
    assert text == modeling_file(type(model), model.config)
    tree = ast.parse(text)
    names = [node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    assert len(names) == len(set(names))
    packages = {(n.module if isinstance(n, ast.ImportFrom) else n.names[0].name) for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))}
    assert not {name for name in packages if str(name).partition(".")[0] in ("treadle", "pydantic", "fla", "triton", "subprocess", "ctypes")}
    assert "type: ignore" not in text and "library(" not in text
    assert "class RetNet(" in text and "class RetNet(" not in modeling_file(type(make("inl")), make("inl").config)
    ruff = Path(sys.executable).with_name("ruff")
    if ruff.exists():  # no name that is not there
        done = subprocess.run([ruff, "check", "--isolated", "--select", "F", "--stdin-filename", "made.py", "-"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_public_names_of_treadle_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of one's own writes `treadle.Model` or `from treadle import Model`; both are the same definitions."""
    monkeypatch.syspath_prepend(tmp_path)
    texts, written = [], Path(inspect.getfile(Mean)).read_text()
    for number, line in enumerate(("import treadle", "import treadle as t", "from treadle import Batch, LanguageModelConfig, LayerState, Model, Output, State, option")):
        text = written.replace("import treadle\n", f"{line}\n").replace("treadle.", ("treadle.", "t.", "")[number])
        (tmp_path / f"public_{number}.py").write_text(text)
        cls = importlib.import_module(f"public_{number}").Mean
        texts.append(modeling_file(cls, cls.Config(vocab_size=VOCABULARY)).replace(f"public_{number}", "public"))
    assert texts[0] == texts[1] == texts[2] and "class Mean(Model):" in texts[0]
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"Mean is none: it has no new_state \(Capabilities\(decodes=False\)\); use"):
        patch.setattr(cls, "capabilities", Capabilities(decodes=False))
        save_for_transformers(build(cls), tmp_path / "refused")
    bare = build(cls)
    bare.config = ModelConfig()
    with pytest.raises(ConfigError, match=r"Mean has no key vocab_size.*treadle\.LanguageModelConfig"):
        _ = bare.vocab_size
    for wrong, said in (("t.Nothing", "treadle has no Nothing to bundle"), ("t", "the module treadle. is used as a value")):
        (tmp_path / "wrong.py").write_text(f"import treadle as t\n\n\nclass Own:\n    def forward(self):\n        return {wrong}\n")
        importlib.invalidate_caches()
        with pytest.raises(ConfigError, match=said):
            Bundle([Place("wrong", "Own")]).text()
        source_of.cache_clear()


def test_a_model_that_writes_no_text_is_refused(tmp_path: Path) -> None:
    model = build("encoder_decoder", vocab_size=VOCABULARY, hidden_size=16, num_heads=2)
    with pytest.raises(ConfigError, match="encoder_decoder is none: it reads source beside its tokens; use --format treadle"):
        save_for_transformers(model, tmp_path)


def test_bytes_have_a_tokenizer_there(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    save_for_transformers(build("hgrn_bit", hidden_size=32, num_layers=1), tmp_path, ByteTokenizer())
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "Þe  quick\n\tbrown föx 漢字 🙂 isn't 12 345"
    assert theirs(text)["input_ids"] == list(text.encode()) and theirs.decode(theirs(text)["input_ids"]) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (None, 255, 256)


def test_the_harness_reads_it_as_treadle_does(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from treadle.evaluation.harness_model import HarnessModel

    model, tokenizer = build("hnet", hidden_sizes=[32, 48], max_position_embeddings=64).eval(), ByteTokenizer()
    save_for_transformers(model, tmp_path, tokenizer)
    theirs = HFLM(pretrained=str(tmp_path), tokenizer=str(tmp_path), device="cpu", dtype="float32", batch_size=2, trust_remote_code=True)
    ours = HarnessModel(model, tokenizer, batch_size=2)
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate([("The wheel", " turned"), ("naïve", " 日本"), ("", "a")])]
    for (log, likeliest), wanted in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked)):
        assert (pytest.approx(log, abs=1e-4), likeliest) == wanted
    more = [Instance("generate_until", {}, (text, {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}), n) for n, text in enumerate(["The wheel", "a"])]
    assert ours.generate_until(more) == theirs.generate_until(more)
