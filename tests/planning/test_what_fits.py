"""What is recommended trains as it stands; sizes against memories; time to a budget."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import treadle
from tests.conftest import make_text
from tests.conftest import treadle as command
from treadle.errors import ConfigError
from treadle.ops.packed_linear import FORMATS
from treadle.ops.peak import CAPABILITY, PEAK_BF16
from treadle.planning import tables
from treadle.planning.duration import duration, flops_of_gpu
from treadle.planning.recommend import Asked, Fit, Preset, what_fits


def test_what_is_recommended_trains_in_the_memory(tmp_path: Path) -> None:
    """The line that is printed, typed as it stands: two steps, and the peak stays below."""
    (tmp_path / "FILE.txt").write_text(make_text(2000))
    asked = command("plan", "--memory", "0.8GB", "--recommend", "--seq-len", 16, "--device", "cpu")
    assert asked.returncode == 0, asked.stderr
    line = next(line for line in asked.stdout.splitlines() if line.startswith("type: "))
    words = shlex.split(line.removeprefix("type: "))[1:]
    assert "nano" in words and words[:2] == ["train", "FILE.txt"]
    short = ["--max_steps", 2, "--eval_rows", 2, "--sample_tokens", 0, "--device", "cpu", "--output_dir", tmp_path / "run"]
    done = command(*words, *short, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["step"] == 2 and 0.4 < summary["peak_memory_gb"] < 0.8


def test_auto_is_planned_as_it_runs() -> None:
    """In shards where a process may not hold the whole, as `auto` decides when it starts."""
    asked = {"preset": "gpt2", "seq_len": 64, "batch_size": 1}
    modes = [treadle.plan(asked, world=2, memory=memory, device="cuda", flops=1e12)["mode"] for memory in ("80GB", "3GB")]
    assert modes == ["ddp", "fsdp"]


def test_a_fit_is_a_configuration() -> None:
    fit = Fit("transformer", "nano", 10, 64, "bf16", True, 16, 1.0)
    config = treadle.TrainConfig(**fit.keys)
    assert (config.preset, config.train.per_device_train_batch_size, config.train.gradient_accumulation_steps) == ("nano", 16, 4)
    assert "--train.gradient_checkpointing true" in fit.command("a.txt") and fit.command("a.txt").startswith("treadle train a.txt ")


def test_smaller_memory_fewer_rows_then_recomputing_then_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = Preset("transformer", "nano", "cuda")
    monkeypatch.setattr(preset, "training_gb", lambda rows, length, precision, again: 1.0 + rows * (0.05 if again else 0.2))
    found = [preset.fit(gb / 0.95, 64, ("bf16",)) for gb in (4.3, 1.9, 1.1, 1.04)]
    assert [(f.rows, f.gradient_checkpointing) if f else None for f in found] == [(16, False), (4, False), (2, True), None]


def test_the_table_of_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "presets_of", lambda arch: [("nano", 10_244_160)])
    table = tables.size_table("transformer", 128, bands=(0.6, 1, 80))
    row = table["presets"][0]
    assert row["trains"][0.6] == 0 and 1 <= row["trains"][1] <= row["trains_with_checkpointing"][1] < 64 == row["trains"][80]
    assert row["generates"][80] == 64
    text = "\n".join(tables.table_lines(table))
    assert "nano" in text and "generating" in text and "-" in text and "assumed" in text


def test_time_to_a_budget() -> None:
    found = duration(6e6, 1000, 0.5, tokens=7.2e6)
    assert (found.tokens_per_second, found.hours, found.steps) == (2000.0, 1.0, 7200)
    assert duration(6e6, 1000, 0.5, hours=1.0).tokens == 7.2e6
    assert flops_of_gpu("rtx_4090", 0.5) == 82.5e12
    with pytest.raises(ConfigError, match="keep one"):
        duration(6e6, 1000, 0.5, tokens=1, hours=1)
    with pytest.raises(ConfigError, match="H100"):
        flops_of_gpu("H10", 0.4)


KEYS = {"hidden_size": 32, "num_layers": 3, "num_heads": 2, "vocab_size": 256}


def test_a_live_model() -> None:
    """plan(model, batch_size=, seq_len=) is the plan of its configuration, block by block and for generating."""
    model = treadle.build("transformer", **KEYS)
    found = treadle.plan(model, batch_size=2, seq_len=64, precision="fp32", flops=1e12, hours=1, inference=True)  # type: ignore[arg-type]
    assert found["parameters"] == treadle.count_params(model) and (found["per_device_train_batch_size"], found["seq_len"]) == (2, 64)
    estimated = treadle.estimate_memory(model, 2, 64)
    assert found["memory"]["activations_gb"] == pytest.approx(estimated["activations_gb"])  # type: ignore[arg-type]
    assert {"total_gb", "params_gb", "grads_gb", "optimizer_gb", "activations_gb", "logits_gb", "phase"} <= found["memory"].keys()
    assert sum(block["parameters"] for block in found["blocks"]) + found["outside_blocks"] == found["parameters"]
    assert len(found["blocks"]) == 3 and all(block["activations_gb"] > 0 for block in found["blocks"])
    assert found["inference"]["total_gb"] < found["memory"]["total_gb"]
    assert found["time"]["tokens"] == pytest.approx(found["time"]["tokens_per_second"] * 3600)
    treadle.enable_checkpointing(model)
    again = treadle.plan(model, batch_size=2, seq_len=64, precision="fp32", flops=1e12)["memory"]
    assert again["activations_gb"] < found["memory"]["activations_gb"]


def test_shares_of_a_rank() -> None:
    """Weights, gradients and optimiser state by layout: whole, state in shards, gradients and state, all three."""
    found = treadle.plan({"model": KEYS}, world=4, batch_size=2, seq_len=32, precision="fp32", flops=1e12)
    whole = 4 * found["parameters"] / 1e9
    parts = {"one process": (1, 1, 2), "ddp": (1, 1, 2), "ddp, optimiser in shards": (1, 1, 0.5),
             "deepspeed, zero stage 2": (1, 0.25, 0.5), "fsdp": (0.25, 0.25, 0.5)}  # fmt: skip
    for name, shares in parts.items():
        rank = found["ranks"][name]
        kinds = [rank["params_gb"], rank["grads_gb"], rank["optimizer_gb"]]
        assert kinds == pytest.approx([share * whole for share in shares], rel=0.01), name
    assert found["ranks"]["fsdp"]["gathered_gb"] > 0


def test_what_does_not_fit_is_told_what_would() -> None:
    """Each change alone is enough, as a plan with it says; none that is set, and none that does nothing for generating."""
    keys = {**KEYS, "num_layers": 4, "hidden_size": 256}
    asked: dict[str, Any] = {"batch_size": 16, "seq_len": 512, "precision": "fp32", "flops": 1e12}

    def advice(memory: str, **more: Any) -> str:
        return tables.lines(treadle.plan({"model": keys}, memory=memory, **asked, **more))[-1].partition("it does not fit; ")[2]

    def needs(**more: Any) -> float:
        found = treadle.plan({"model": keys}, **{**asked, **more})
        return found["inference" if more.get("inference") else "memory"]["total_gb"]

    assert advice("1GB") == "--batch_size 8 or --gradient_checkpointing true or --world 8 --parallel fsdp would do"
    assert needs(batch_size=8) < 1 < needs() and needs(gradient_checkpointing=True) < 1
    assert needs(world=8, mode="fsdp") < 1 < needs(world=4, mode="fsdp")
    assert advice("0.6GB", gradient_checkpointing=True) == "--batch_size 8 would do"
    assert advice("0.45GB") == "--gradient_checkpointing true --batch_size 1 would do"
    assert needs(gradient_checkpointing=True, batch_size=1) < 0.45 < needs(batch_size=1)
    assert advice("0.4GB") == "fewer rows and gradient checkpointing are not enough: choose a smaller model"
    assert advice("0.45GB", inference=True) == "--batch_size 4 or --seq_len 128 would do"
    assert needs(batch_size=4, inference=True) < 0.45 > needs(seq_len=128, inference=True)
    assert advice("0.3GB", inference=True) == "fewer and shorter texts are not enough: choose a smaller model"


def test_what_auto_shards_stays_in_shards_in_what_is_advised() -> None:
    asked = {"preset": "gpt2", "seq_len": 64, "batch_size": 1}
    found = treadle.plan(asked, world=2, memory="1.6GB", device="cuda", flops=1e12)
    assert found["mode"] == "fsdp" and found["asked"]["tries"] == ["--world 8"]
    fits = [treadle.plan(asked, world=world, memory="1.6GB", device="cuda", flops=1e12)["asked"]["fits"] for world in (4, 8)]
    assert fits == [False, True]


def says(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    """The lines of `treadle plan`."""
    from treadle.cli import app

    app(["plan", *map(str, words)], prog_name="treadle", standalone_mode=False)
    return capsys.readouterr().out.splitlines()


def test_what_is_typed_stays_in_what_is_recommended(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Also under another name of its key; the search keeps to it, and the line that is printed is planned as it stands."""
    (tmp_path / "FILE.txt").write_text("x")

    def printed(*flags: object) -> list[str]:
        lines = says(capsys, "--memory", "1.5GB", "--recommend", "--device", "cpu", "--seq-len", "128", *flags)
        return shlex.split(next(line for line in lines if line.startswith("type: ")).removeprefix("type: "))

    words = printed("--optim.name", "muon", "--batch-size", "3", "--value_embeddings", "true", "--vocab_size", "4096", "--seq_len_schedule", "[[0, 64]]")
    typed = dict(zip(words[3::2], words[4::2], strict=True))
    assert (typed["--optim.name"], typed["--model.value_embeddings"], typed["--tokenizer.vocab_size"]) == ("muon", "true", "4096")
    assert (typed["--train.per_device_train_batch_size"], typed["--train.global_batch_size"], typed["--train.seq_len_schedule"]) == ("3", "3", "[[0.0, 64.0]]")
    for line in (words, printed(), printed("--hidden_size", 64)):  # the default recipe's optimiser is not under a text; 64 suits not all presets
        assert line[2] == "FILE.txt"
        assert says(capsys, tmp_path / "FILE.txt", *line[3:], "--memory", "1.5GB", "--flops", "1e12")[-1].endswith("it fits"), line
    (tmp_path / "r.toml").write_text('optim.name = "muon"\n')
    assert printed("--config", tmp_path / "r.toml")[2:4] == ["--config", str(tmp_path / "r.toml")]
    passes = printed("--batch_size", 4, "--gradient_accumulation_steps", 2)
    assert passes[passes.index("--train.global_batch_size") + 1] == "8"


def test_texts_at_once_are_those_that_were_planned(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--device", "cpu", "--inference", "--seq_len", 256, "--preset", "gpt2"]
    line = says(capsys, "--memory", "1.2GB", "--recommend", *asked)[0]
    rows, total = re.findall(r"(\d+) text\(s\)", line)[0], re.findall(r"([\d.]+) of 1.20 GB", line)[0]
    assert int(rows) > 1 and any(f"tokens: {total} GB" in line for line in says(capsys, *asked, "--batch_size", rows, "--flops", "1e12"))


def test_weights_of_several_texts_are_no_format(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x")
    recipe = tmp_path / "mix.toml"
    recipe.write_text(f'data.path = ["{tmp_path / "a.txt"}", "{tmp_path / "b.txt"}"]\n')
    assert treadle.plan(recipe, weights=[0.7, 0.3], flops=1e12)["mode"] == "none"
    with pytest.raises(ConfigError, match="add --inference"):
        treadle.plan({"preset": "nano"}, weights="int8", flops=1e12)


def test_advice_keeps_the_rows_of_a_step_and_tries_other_formats(capsys: pytest.CaptureFixture[str]) -> None:
    step = ["--batch_size", 16, "--gradient_accumulation_steps", 4, "--global_batch_size", 64, "--seq_len", 256, "--preset", "nano", "--device", "cpu"]
    advised = says(capsys, *step, "--memory", "0.62GB", "--flops", "1e12")[-1]
    flags = re.findall(r"--batch_size (\d+) --gradient_accumulation_steps (\d+)", advised)
    assert flags and int(flags[0][0]) * int(flags[0][1]) == 64
    asked = {"preset": "gpt2", "batch_size": 1, "seq_len": 64, "flops": 1e12, "inference": True, "device": "cpu"}
    assert "--weights fp32" in treadle.plan({}, weights="int8", memory="0.9GB", **asked)["asked"]["tries"]


def test_steps_of_a_budget_under_a_growing_batch() -> None:
    """100 batches: one a step, then three (from a share of the run on), or four (from a step on)."""
    keys: dict[str, Any] = {"model": KEYS, "max_steps": 10, "batch_size": 4, "seq_len": 32, "precision": "fp32"}
    for schedule, steps in ((None, 100), ([[0, 1], [0.5, 3]], 50), ([[0, 1], [20, 4]], 40)):
        found = treadle.plan({**keys, **({"batch_size_schedule": schedule} if schedule else {})}, tokens=100 * 4 * 32, flops=1e12)
        assert found["time"]["steps"] == steps


def test_generating_counts_what_is_laid_out() -> None:
    """A second copy of fp32 matrices for the compiled step on a CPU; those in fewer bits are held twice, beside one in fp32."""
    asked = {"model": {**KEYS, "hidden_size": 64}, "batch_size": 1, "seq_len": 32}
    sizes = {weights: treadle.plan(asked, inference=True, weights=weights, flops=1e12)["inference"]["laid_out_gb"] for weights in FORMATS}
    matrices, largest = 4 * (3 * (4 * 64 * 64 + 3 * 64 * 192) + 256 * 64) / 1e9, 4 * 256 * 64 / 1e9
    assert sizes["fp32"] in (0.0, pytest.approx(matrices)) and sizes["bf16"] - largest == pytest.approx(matrices)
    assert matrices / 4 < sizes["int4"] - largest < sizes["int8"] - largest < 0.55 * matrices
    assert treadle.plan(asked, inference=True, device="cuda", flops=1e12)["inference"]["laid_out_gb"] == 0


def test_fp8_is_planned_for_gpus_that_have_it() -> None:
    """Of a named one the plan says what the run would."""
    asked = {"batch_size": 2, "seq_len": 32, "precision": "fp8"}
    for gpu, capability in (("A100", "8.0"), ("rtx 3090", "8.6")):
        with pytest.raises(ConfigError, match=f"fp8 needs a GPU of compute capability 8.9 or more, this GPU's is {capability}"):
            treadle.plan({"model": KEYS}, gpu=gpu, **asked)
    assert treadle.plan({"model": KEYS}, gpu="L4", **asked)["precision"] == "fp8"
    assert set(CAPABILITY) == set(PEAK_BF16)


def test_a_measured_step() -> None:
    found = treadle.plan({"model": KEYS}, batch_size=2, seq_len=32, precision="fp32", measure=True)
    assert found["assumptions"]["step_measured_here"] and 1e-4 < found["time"]["step_seconds"] < 30


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--recommend"], "treadle plan --memory 12GiB --recommend"), (["--recommend", "--memory", "0.4GB"], "use shorter rows"),
        (["--gpu", "H10"], "'H100'"), (["--tokens", "1e9", "--hours", "2"], "keep one"), (["--exact", "maybe"], "--exact stands alone"),
        (["--utilisation", "0.5"], "--gpu H100"), (["--tokens", "-3"], "above 0"), (["--weights", "int8"], "add --inference"),
        (["--inference", "--weights", "int3"], "int8"), (["--recommend", "--memory", "1GB", "--world", "2"], "leave out --world"),
        (["--world", "2", "--parallel", "none"], "is one process, but there are 2"),
        (["--recommend", "--memory", "1GB", "--batch_size", "3", "--global_batch_size", "4"], "no multiple of 3"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_questions(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    from treadle.cli import app

    with pytest.raises(ConfigError) as caught:
        app(["plan", *flags], prog_name="treadle", standalone_mode=False)
    assert words in str(caught.value)


def test_generating_is_recommended_for_the_length_that_was_asked() -> None:
    """A preset that was made for shorter rows is none; an unknown one is named with those there are."""
    with pytest.raises(ConfigError, match="no preset of transformer runs in 1 GB with rows of 100000"):
        treadle.recommend_config(1.0, training=False, seq_len=100_000)
    with pytest.raises(ConfigError, match=r"has no preset 'nope'; give one of .*nano"):
        what_fits(1.0, asked=Asked("nope"))
