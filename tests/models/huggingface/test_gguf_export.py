"""`export --format gguf`: llama.cpp continues as treadle does and cuts texts as its tokenizer does; other models are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Inner

import treadle
from tests.conftest import flags, make_text
from tests.conftest import treadle as command
from tests.models.huggingface.families import their_model
from tests.models.huggingface.llama_cpp import LlamaCpp
from treadle.data.batch import Batch
from treadle.errors import ConfigError, InputError
from treadle.models.base import Model
from treadle.models.export import export
from treadle.models.huggingface.gguf_file import GGUFFile
from treadle.models.huggingface.gguf_tokens import PRE, metadata_of
from treadle.models.huggingface.gguf_writing import write_gguf, written_for_llama_cpp
from treadle.text.base import Tokenizer
from treadle.text.trained import BPETokenizer, LibraryTokenizer

pytest.importorskip("gguf", reason="the gguf package is not here: pip install 'treadle[hf]'")

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_kv_heads": 2},
    "llama_biases": {"attention_bias": True, "mlp_bias": True, "tie_embeddings": False, "head_dim": 32},
    "llama_linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "qwen2": {"attention_bias": True, "attention_out_bias": False},
    "qwen3": {"qk_norm": True, "head_dim": 32},
}
TEXTS = ("The wheel's 1234 threads, she'd said:\n\n  \"No.\"  ", "naïve — 12,5 % ähnlich\t\tdas  Wort\r\n x", "ein 𝄞 Zeichen 日本語 का", " I'LL  go!!! 2024-11-27 ")


def model_of(name: str, vocab_size: int = 256, seed: int = 0) -> Model:
    """A random model, its norms and biases random too, with logits far enough apart for greedy decoding to be well posed."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 96, "max_position_embeddings": 256, "norm_eps": 1e-5}
    model = treadle.build("transformer", None, style="llama", vocab_size=vocab_size, **{**shape, **SHAPES[name]}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def bpe(vocab_size: int = 400) -> LibraryTokenizer:
    return BPETokenizer.trained_on(iter([make_text(100)]), vocab_size)


def cut_by(name: str) -> LibraryTokenizer:
    """A small tokenizer that cuts a text into words as llama.cpp's `name` does."""
    inner = Inner(models.BPE(ignore_merges=name == "llama-bpe"))
    steps = []
    for step in PRE[name]:
        made: dict[str, Any] = {
            "ByteLevel": lambda s: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=s["use_regex"]),
            "Digits": lambda s: pre_tokenizers.Digits(individual_digits=True),
            "Split": lambda s: pre_tokenizers.Split(Regex(s["pattern"]["Regex"]), behavior="isolated"),
        }
        steps.append(made[step["type"]](step))
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False)  # fmt: skip
    inner.train_from_iterator([make_text(60), *TEXTS * 8], trainer)
    return LibraryTokenizer(inner, "<|im_end|>")


@torch.no_grad()
def logs(model: Model, prompt: list[int]) -> torch.Tensor:
    """Log-probabilities of what follows a prompt, [V]."""
    return model(Batch.from_ids(torch.tensor([prompt]))).logits[0, -1].float().log_softmax(-1)


def greedy(model: Model, prompt: list[int], count: int, end: int) -> list[int]:
    """The likeliest tokens by whole forward passes, up to `count` or to the end of a document, which is one of them."""
    row = list(prompt)
    while len(row) < len(prompt) + count and row[-1] != end:
        row.append(int(logs(model, row).argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_continues_as_treadle_does(name: str, tmp_path: Path) -> None:
    model, tokenizer = model_of(name), Tokenizer.load("byte")
    path = write_gguf(tmp_path / "model.gguf", model.config, model.named_weights(), tokenizer, "f32")
    prompt = tokenizer.prompt_ids("The wheel turned and the thread")
    wanted, judge = greedy(model, prompt, 20, tokenizer.eos_id), LlamaCpp(path)
    assert judge.greedy(prompt, 20) == wanted and len(set(wanted)) > 5
    near = logs(model, prompt)
    for token, log in judge.next(prompt).items():
        assert abs(log - float(near[token])) < 1e-4
    again = treadle.from_pretrained(path)
    ours, theirs = model.named_weights(), again.named_weights()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert type(GGUFFile(path).own_tokenizer()) is type(tokenizer)


@pytest.mark.parametrize(("kind", "bound"), [("f16", 0.01), ("q8_0", 0.1)])
def test_smaller_numbers_stay_near(kind: str, bound: float, tmp_path: Path) -> None:
    model, tokenizer = model_of("llama"), Tokenizer.load("byte")
    path = write_gguf(tmp_path / "model.gguf", model.config, model.named_weights(), tokenizer, kind)
    prompt = tokenizer.prompt_ids("The wheel")
    wanted, found = logs(model, prompt), LlamaCpp(path).next(prompt)
    assert len(found) == 5 and all(abs(log - float(wanted[token])) < bound for token, log in found.items())
    weights, again = model.named_weights(), treadle.from_pretrained(path).named_weights()
    worst = max(float((weights[key] - again[key]).detach().abs().max() / weights[key].detach().abs().max()) for key in weights)
    assert 0 < worst < (1e-3 if kind == "f16" else 0.005)  # half a step of a block's largest number is 1/254 of it


@pytest.mark.parametrize("name", PRE)
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(name: str, tmp_path: Path) -> None:
    tokenizer = cut_by(name)
    model = model_of("llama", tokenizer.vocab_size + 5)  # rows that no token has
    path = write_gguf(tmp_path / "model.gguf", model.config, model.named_weights(), tokenizer, "f32")
    judge, again = LlamaCpp(path), GGUFFile(path).own_tokenizer()
    for text in (*TEXTS, make_text(5), "<|im_end|> is text here"):
        wanted = tokenizer.encode(text).tolist()
        assert judge.tokenize(text) == wanted, text
        if "<|" not in text:
            assert again.encode(text).tolist() == wanted
    assert again.eos_id == tokenizer.eos_id
    assert again.decode(tokenizer.encode(TEXTS[1])) == TEXTS[1]


def test_every_byte_is_a_token_of_llama_cpp(tmp_path: Path) -> None:
    model, tokenizer = model_of("llama"), Tokenizer.load("byte")
    path = write_gguf(tmp_path / "model.gguf", model.config, model.named_weights(), tokenizer, "f32")
    judge = LlamaCpp(path)
    for text in (*TEXTS, "".join(map(chr, range(1, 0x250))), "þ ÿ þÿ"):
        assert judge.tokenize(text) == list(text.encode())


def test_the_template_of_conversations_goes_along(tmp_path: Path) -> None:
    model, tokenizer = model_of("llama", 400), bpe()
    path = write_gguf(tmp_path / "model.gguf", model.config, model.named_weights(), tokenizer, "f32", "{{ messages[0]['content'] }}")
    again = GGUFFile(path).own_tokenizer()
    assert again.chat_template is not None and again.chat_template.source == "{{ messages[0]['content'] }}"
    assert again.encode(TEXTS[0]).tolist() == tokenizer.encode(TEXTS[0]).tolist() == LlamaCpp(path).tokenize(TEXTS[0])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"token_shift": True}, "token_shift = True"),
        ({"layer_types": ["sliding_attention"], "sliding_window": 8}, "sliding_window"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"gated_activation": "gelu"}, "silu"),
        ({"style": "gpt2"}, "style = 'gpt2'"),
    ],
)
def test_what_differs_is_named(keys: dict[str, Any], said: str) -> None:
    shape = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 256, "style": "llama", **keys}
    with pytest.raises(ConfigError, match=said):
        written_for_llama_cpp(treadle.build("transformer", None, **shape).config)
    with pytest.raises(ConfigError, match="another architecture"):
        written_for_llama_cpp(treadle.build("ssm", None, vocab_size=256, hidden_size=32, num_layers=1).config)


def test_tokenizers_that_llama_cpp_has_not(tmp_path: Path) -> None:
    for kind in ("wordpiece", "unigram"):
        tokenizer = Tokenizer.train(kind, iter([make_text(100)]), 400)
        with pytest.raises(ConfigError, match=r"llama\.cpp's is byte-level BPE"):
            metadata_of(tokenizer, 400)
    with pytest.raises(ConfigError, match="no pre_tokenizer"):
        metadata_of(Tokenizer.train("char", iter([make_text(100)]), 300), 300)
    with pytest.raises(ConfigError, match="257 ids"):
        metadata_of(bpe(), 257)


def test_a_number_too_large_for_half_precision(tmp_path: Path) -> None:
    model = model_of("llama")
    weights = dict(model.named_weights())
    weights["embedding.weight"] = weights["embedding.weight"].detach() * 1e6
    with pytest.raises(ConfigError, match="--gguf_type f32"):
        write_gguf(tmp_path / "model.gguf", model.config, weights, None, "f16")
    assert not list(tmp_path.iterdir())


def test_a_model_of_transformers_comes_back(tmp_path: Path) -> None:
    """transformers -> .gguf -> transformers' own reader."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    theirs = their_model("smollm")
    theirs.save_pretrained(tmp_path / "folder")
    model = treadle.from_pretrained(tmp_path / "folder")
    path = write_gguf(tmp_path / "model.gguf", model.config, model.named_weights(), None, "f32")
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)["tensors"]
    state = theirs.state_dict()
    assert all(torch.equal(torch.as_tensor(read[name]), state[name]) for name in read) and len(read) >= len(state) - 1


def test_the_command_line(tmp_path: Path, text_file: Path) -> None:
    keys = flags(max_steps=2, token_shift="false", qk_norm="false", output_dir="runs/a")
    command("train", text_file, *keys, cwd=tmp_path).check_returncode()
    done = command("export", "runs/a", "--format", "gguf", "--license", "apache-2.0", cwd=tmp_path)
    assert done.returncode == 0 and "llama-cli -m" in done.stdout, done.stderr
    path = tmp_path / "runs" / "a" / "gguf" / "a-f32.gguf"
    assert GGUFFile(path).metadata["general.license"] == "apache-2.0" and (path.parent / "README.md").is_file()
    said = command("generate", path, "--prompt", "The", "--greedy", "--max_new_tokens", 8, cwd=tmp_path)
    assert said.stdout.startswith("The") and said.returncode == 0
    for kind in ("f32", "q8_0"):  # its own file is replaced
        export(str(tmp_path / "runs" / "a"), layout="gguf", gguf_type=kind)
    assert sorted(file.name for file in path.parent.iterdir()) == ["README.md", "a-f32.gguf", "a-q8_0.gguf"]
    for wrong, words in (({"gguf_type": "q4"}, "q8_0"), ({"precision": "bf16"}, "--gguf_type"), ({"packed": True}, "--packed")):
        with pytest.raises(InputError, match=words):
            export(str(tmp_path / "runs" / "a"), layout="gguf", **wrong)
    with pytest.raises(InputError, match="--format gguf"):
        export(str(tmp_path / "runs" / "a"), gguf_type="f16")
    (tmp_path / "mine.gguf").write_bytes(b"GGUF of somebody else")
    done = command("export", "runs/a", "--format", "gguf", "--output", "mine.gguf", cwd=tmp_path)
    assert done.returncode == 2 and "another program" in done.stderr
    assert (tmp_path / "mine.gguf").read_bytes() == b"GGUF of somebody else"
