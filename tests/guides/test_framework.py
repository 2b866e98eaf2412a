"""The general framework's guide: its classes and helpers give numbers and objects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import treadle
from tests.conftest import make_text
from treadle.errors import ConfigError


@pytest.fixture(scope="module")
def model() -> treadle.Model:
    return treadle.build("transformer", hidden_size=32, num_layers=3, num_heads=2, vocab_size=256)  # type: ignore[return-value]


def test_load_and_train(in_folder: Path) -> None:
    """Tokenizer.load, Model.load of a preset's shape, Dataset.load, Trainer, Model.load of what was trained."""
    (in_folder / "train.txt").write_text(make_text(60))
    tokenizer = treadle.Tokenizer.load("byte")
    dataset = treadle.Dataset.load("train.txt", tokenizer=tokenizer, max_seq_len=32)
    model = treadle.build("transformer", hidden_size=32, num_layers=1, num_heads=2, vocab_size=tokenizer.vocab_size)
    config = treadle.TrainConfig(max_steps=2, batch_size=2, fp16=False, bf16=False, save_dir="kept", wandb_project="mine",
                                 output_dir="run", sample_tokens=0)  # fmt: skip
    assert config.log.project == "mine" and config.checkpoint.checkpoint_dir == "kept"
    assert treadle.TrainConfig(fp16=True, bf16=False).train.precision == "fp16"
    with pytest.raises(ConfigError, match=r"train\.precision is given twice"):
        treadle.TrainConfig(fp16=True, bf16=True)
    assert treadle.Trainer(model, dataset, config=config, distributed=True).train()["step"] == 2
    assert list((in_folder / "kept").glob("step-*"))
    again = treadle.Model.load("run", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


def test_a_preset_is_a_shape() -> None:
    for words in (("nano",), ("transformer",)):
        more = {"preset": "nano"} if words == ("transformer",) else {}
        with pytest.raises(ConfigError, match=r"without weights: give a run or a model folder.*pretrained=False for random"):
            treadle.Model.load(*words, **more)  # type: ignore[arg-type]
        assert treadle.count_params(treadle.Model.load(*words, pretrained=False, device="cpu", **more)) == 10_244_160  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean 'device'"):
        treadle.Model.load("nano", devise="cpu")


def test_counts_and_sizes(model: treadle.Model, capsys: pytest.CaptureFixture[str]) -> None:
    count = sum(p.numel() for p in model.parameters())
    assert treadle.count_params(model) == count == treadle.count_params(model, trainable_only=True)
    model.blocks()[0].requires_grad_(False)
    assert treadle.count_params(model, trainable_only=True) == count - treadle.count_params(model.blocks()[0])  # type: ignore[arg-type]
    model.blocks()[0].requires_grad_(True)
    used = treadle.memory_usage(model)
    assert used["parameters_gb"] == pytest.approx(4 * count / 1e9) and 0 < used["process_gb"] <= used["peak_gb"] * 1.01
    assert treadle.memory_usage().keys() == {"process_gb", "peak_gb", "gpu_gb", "allocated_gb"}
    found = treadle.print_summary(model)
    shown = capsys.readouterr().out
    assert found["parameters"] == count == found["outside_blocks"] + sum(found["blocks"]) and len(found["blocks"]) == 3
    assert f"{count:,} parameters" in shown and "3 blocks" in shown


def test_estimated_memory(model: treadle.Model) -> None:
    """It grows with rows and positions, and gradient checkpointing lowers it, given or marked on the blocks."""
    count = treadle.count_params(model)
    plain = treadle.estimate_memory(model, batch_size=4, seq_len=64)
    assert plain["params_gb"] == plain["grads_gb"] == pytest.approx(4 * count / 1e9)
    assert plain["optimizer_gb"] == pytest.approx(8 * count / 1e9, rel=1e-3)  # and the step that AdamW counts for each parameter
    wide = treadle.estimate_memory(model, batch_size=8, seq_len=64)
    assert 1.8 < wide["activations_gb"] / plain["activations_gb"] < 2.2  # type: ignore[operator]
    asked = treadle.estimate_memory(model, 4, 64, gradient_checkpointing=True)
    treadle.enable_checkpointing(model)
    try:
        assert treadle.estimate_memory(model, 4, 64) == asked and asked["activations_gb"] < plain["activations_gb"]  # type: ignore[operator]
    finally:
        treadle.enable_checkpointing(model, False)
    reading = treadle.estimate_memory(model, 4, 64, training=False)
    assert reading["state_gb"] == model.state_bytes(4, 64) / 1e9 and reading["total_gb"] < plain["total_gb"]  # type: ignore[operator]


def test_a_loop_by_hand(model: treadle.Model) -> None:
    """Mixed precision, gradient checkpointing of one layer: the same loss, fewer saved bytes."""
    batch = treadle.Batch.for_training(torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(0)))

    def loss_and_saved(precision: str) -> tuple[torch.Tensor, int]:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):  # type: ignore[func-returns-value]
            with treadle.autocast(precision):
                out = model.train()(batch)
            total, labels = treadle.loss(out, batch)
        (total / labels).backward()
        return (total / labels).detach(), sum(sizes)

    full, saved = loss_and_saved("fp32")
    gradient = model.head.weight.grad.clone()
    for layer in model.blocks():
        layer.gradient_checkpointing = True  # type: ignore[assignment]
    model.zero_grad()
    try:
        again, fewer = loss_and_saved("fp32")
    finally:
        treadle.enable_checkpointing(model, False)
    assert torch.equal(full, again) and torch.equal(model.head.weight.grad, gradient) and fewer < 0.6 * saved
    half, _ = loss_and_saved("bf16")
    assert half != full and abs(half - full) < 0.02
    with treadle.autocast("bf16"):
        assert model(batch).logits.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="precision = 'fp8'"):
        treadle.autocast("fp8")


def test_recommended_config() -> None:
    """A TrainConfig of the largest preset that fits; the plan of it agrees."""
    config = treadle.recommend_config(vram_gb=1.2, training=True, seq_len=64)
    assert (config.preset, config.data.seq_len, config.train.precision) == ("micro", 64, "bf16")
    assert config.train.per_device_train_batch_size * (config.train.gradient_accumulation_steps or 0) == 64
    planned = treadle.plan(config, flops=1e12, device="cuda")["memory"]["total_gb"]
    assert 0.9 < planned <= 1.2
    assert treadle.recommend_config(vram_gb=12, training=False).preset == "large"
    with pytest.raises(ConfigError, match=r"no preset of transformer trains in 0\.1 GB"):
        treadle.recommend_config(vram_gb=0.1)
    with pytest.raises(ConfigError, match="vram_gb = '12GB': give the gigabytes"):
        treadle.recommend_config("12GB")  # type: ignore[arg-type]


def test_a_plan_of_a_dictionary() -> None:
    asked = {"model": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 256}, "data": {"seq_len": 32}, "batch_size": 2}
    found = treadle.plan(asked, flops=1e12)
    assert found["per_device_train_batch_size"] == 2 and isinstance(found["memory"]["total_gb"], float)


def test_streams_and_pipelines(in_folder: Path) -> None:
    """StreamingDataset and DataPipeline with the guide's words; a stream trains."""
    (in_folder / "train.txt").write_text(make_text(200))
    stream = treadle.StreamingDataset("train.txt", tokenizer="byte", max_seq_len=32, shuffle_buffer=1000)
    again = treadle.DataPipeline("train.txt", "byte", seq_len=32, streaming=True)
    plain = treadle.StreamingDataset("train.txt", "byte", max_seq_len=32, shuffle_buffer=0)
    first, same, ordered = (next(iter(treadle.create_dataloader(data, batch_size=4))).input_ids for data in (stream, again, plain))
    assert torch.equal(first, same) and first.shape[1] == 32 and not torch.equal(first, ordered)
    with pytest.raises(ConfigError, match="give 0 for rows in their order"):
        treadle.StreamingDataset("train.txt", shuffle_buffer=-1)
    louder = treadle.DataPipeline("train.txt", tokenizer="byte", transforms=[str.upper], seq_len=32)
    tokens = next(iter(treadle.create_dataloader(louder, batch_size=2))).input_ids
    assert not ((tokens >= ord("a")) & (tokens <= ord("z"))).any()
    model = treadle.build("transformer", hidden_size=32, num_layers=1, num_heads=2, vocab_size=256)
    config = treadle.TrainConfig(max_steps=2, batch_size=2, output_dir="run", sample_tokens=0, num_workers=0)
    assert treadle.Trainer(model, stream, config=config).train()["step"] == 2


def test_its_architectures() -> None:
    """INL dynamics, flash, sliding, sparse and linear attention, and models of linear time, by the names they have elsewhere."""
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 256}
    ids = treadle.Batch.from_ids([[1, 2, 3, 4]])
    for keys in (
        {"use_inl_dynamics": True}, {"layer_types": ["sliding_attention"], "sliding_window": 2}, {"layer_types": ["sparse"]},
        {"layer_types": ["linear"]}, {"layer_types": ["mamba2"]}, {"layer_types": ["rwkv"]}, {"layer_types": ["retnet"]},
    ):  # fmt: skip
        assert treadle.build("transformer", **shape, **keys)(ids).logits.shape == (1, 4, 256)
    assert treadle.TrainConfig(attn_implementation="flash").train.attention_backend == "flash"


def test_a_trainer_with_metrics_of_its_own(in_folder: Path) -> None:
    """The LLM trainer's guide: a subclass that logs numbers of its own (a callback's: tests/training/test_callbacks.py)."""
    import json

    (in_folder / "train.txt").write_text(make_text(60))
    dataset = treadle.Dataset.load("train.txt", tokenizer="byte", max_seq_len=32)

    class Mine(treadle.Trainer):
        def compute_metrics(self, sums: dict[str, float]) -> dict[str, float]:
            return {**super().compute_metrics(sums), "wrong": 1 - sums["correct"] / sums["labels"]}

    model = treadle.build("transformer", hidden_size=32, num_layers=1, num_heads=2, vocab_size=256)
    config = treadle.TrainConfig(max_steps=2, batch_size=2, eval_steps=1, output_dir="run", sample_tokens=0)
    held_out = treadle.Dataset.load("train.txt", tokenizer="byte", max_seq_len=32, split="validation")
    Mine(model, dataset, held_out, config).train()
    rows = [json.loads(line) for line in (in_folder / "run" / "metrics.jsonl").read_text().splitlines()]
    wrong = [value for row in rows for key, value in row.items() if key.endswith("wrong")]
    assert len(wrong) == 2 and all(0 <= value <= 1 for value in wrong)
