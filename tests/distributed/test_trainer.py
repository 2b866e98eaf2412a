"""A whole training as several processes: same data, same result, same checkpoints."""

from __future__ import annotations

import json
import math
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import treadle
from tests.conftest import make_text
from tests.several import run_in
from treadle.checkpoint import sharded, writer
from treadle.checkpoint.layout import checkpoint_name
from treadle.checkpoint.reader import Checkpoint
from treadle.distributed.world import World
from treadle.errors import ConfigError, PeerFailed, SaveError, Stopped
from treadle.training.callbacks.base import Callback
from treadle.training.context import Context
from treadle.training.requests import Requests
from treadle.training.trainer import Trainer

SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(make_text(), encoding="utf-8")
    treadle.Dataset.load(path, tokenizer="byte", seq_len=32)  # prepared once, here
    return str(path)


Keys = dict[str, Any]


def build(text: str, folder: Path, keys: Keys, resume: bool = False, callbacks: Any = ()) -> Trainer:
    data = {name: treadle.Dataset.load(text, tokenizer="byte", seq_len=32, split=name) for name in ("train", "validation")}
    keys = {"max_steps": 12, "batch_size": 2, "global_batch_size": 8, "save_steps": 6, "eval_steps": 6, "eval_rows": 10,
            "logging_steps": 1, "sample_tokens": 4, "report_to": ["jsonl"], "precision": "fp32",
            "output_dir": str(folder), **keys}  # fmt: skip
    model = treadle.build("transformer", vocab_size=256, style="gpt2", dropout=keys.pop("dropout", 0.0), **SHAPE)
    return Trainer(model, data["train"], data["validation"], treadle.TrainConfig(**keys), callbacks=callbacks,
                   resume=resume)  # fmt: skip


def train(text: str, folder: Path, keys: Keys, resume: bool = False) -> str:
    made = build(text, folder, keys, resume)
    if resume:
        found = made.checkpoints.find_newest()
        assert found is not None
        made.load_checkpoint(found)
    summary = made.train()
    assert summary["processes"] == (dist.get_world_size() if dist.is_initialized() else 1)
    return summary["status"]


def rows_of(folder: Path, split: str | None = None) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("split") == split]


def checkpoint(folder: Path, step: int = 12) -> Checkpoint:
    return Checkpoint(folder / "checkpoints" / checkpoint_name(step))


def contents(folder: Path, step: int = 12) -> dict[str, bytes]:
    """Every bit of weights and optimiser; files in shards may order their tensors differently."""
    saved = checkpoint(folder, step)
    return {name: tensor.numpy().tobytes() for stem in ("model", "optimizer") for name, tensor in saved.tensors(stem).items()}


CURVES = ("loss", "bpb", "grad_norm", "tokens", "learning_rate")


def agree(one: Path, other: Path, relative: float = 1e-5, curves: tuple[str, ...] = CURVES) -> None:
    """Equal curves and evaluations within `relative`."""
    a, b = rows_of(one), rows_of(other)
    assert [row["step"] for row in a] == [row["step"] for row in b] and len(a) > 0
    for name in curves:
        ours, theirs = ([math.nan if row.get(name) is None else row[name] for row in rows] for rows in (a, b))
        assert ours == pytest.approx(theirs, rel=relative, nan_ok=True), name
    for name in ("loss", "accuracy", "labels", "bytes") if relative < 1e-4 else ("loss", "labels"):
        evaluations = [[row[name] for row in rows_of(folder, "validation")] for folder in (one, other)]
        assert evaluations[0] == pytest.approx(evaluations[1], rel=relative) and evaluations[0], name


MODES: dict[str, tuple[int, Keys]] = {
    "ddp": (2, {"parallel.mode": "ddp"}),
    "ddp, one pass a step": (2, {"parallel.mode": "ddp", "batch_size": 4}),
    "ddp, optimiser in shards": (2, {"parallel.mode": "ddp", "shard_optimizer": True, "bucket_megabytes": 0.01}),
    "fsdp": (2, {"parallel.mode": "fsdp", "reshard_after_forward": False}),
    "hybrid": (4, {"parallel.mode": "fsdp", "shard_size": 2, "gradient_checkpointing": True}),
    "ddp of 4": (4, {"parallel.mode": "ddp"}),
}


@pytest.fixture(scope="module")
def alone(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(text, folder, {"max_steps": 50, "eval_steps": 25, "save_steps": 50})
    return folder


@pytest.mark.parametrize("name", list(MODES))
def test_fifty_steps_are_the_same_for_any_number_of_processes(
    text: str, tmp_path: Path, alone: Path, name: str
) -> None:
    size, keys = MODES[name]
    run_in(size, train, text, tmp_path / "run", {"max_steps": 50, "eval_steps": 25, "save_steps": 50, **keys})
    agree(tmp_path / "run", alone)
    saved, want = checkpoint(tmp_path / "run", 50), checkpoint(alone, 50)
    saved.verify()
    assert saved.sharded == ("fsdp" in str(keys) or "shard_optimizer" in keys)
    for stem in ("model", "optimizer"):
        got, wanted = saved.tensors(stem), want.tensors(stem)
        assert got.keys() == wanted.keys()
        for key, tensor in wanted.items():
            torch.testing.assert_close(got[key], tensor, atol=2e-4, rtol=1e-3, msg=f"{stem} {key}")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events[0]["processes"] == size and events[0]["event"] == "started"
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_products_in_shards(text: str, tmp_path: Path, precision: str) -> None:
    """Blocks gathered in 16 bits give what autocast gives, up to the rounding of norms."""
    keys = {"precision": precision, "max_steps": 8}
    train(text, tmp_path / "alone", keys)
    run_in(2, train, text, tmp_path / "fsdp", {**keys, "parallel.mode": "fsdp"})
    run_in(2, train, text, tmp_path / "ddp", {**keys, "parallel.mode": "ddp"})
    agree(tmp_path / "ddp", tmp_path / "alone", 5e-3)
    agree(tmp_path / "fsdp", tmp_path / "alone", 2e-2)
    assert checkpoint(tmp_path / "fsdp", 8).tensors("model")["embedding.weight"].dtype == torch.float32


def test_listed_modules_stay_in_full_precision(text: str, tmp_path: Path) -> None:
    # In the order of the block: the norm before the MLP (its weight, the residual stream), then the MLP.
    assert run_in(2, kinds_seen, text, tmp_path / "r") == [["torch.float32", "torch.float32", "torch.bfloat16"]] * 2


def kinds_seen(text: str, folder: Path) -> list[str]:
    """The types of a block's weights, of a listed module's, and of the residual stream, as a forward pass meets them."""
    from treadle.models.transformer import Transformer

    Transformer.full_precision_modules = lambda self: [b.mlp_norm for b in self.layers]  # type: ignore[method-assign]
    made, seen = build(text, folder, {"parallel.mode": "fsdp", "precision": "bf16", "max_steps": 2}), []
    block = made.model.layers[0]
    block.mlp.register_forward_pre_hook(lambda mlp, inputs: seen.append(mlp.up.weight.dtype))
    block.mlp_norm.register_forward_pre_hook(lambda norm, inputs: seen.extend([norm.weight.dtype, inputs[0].dtype]))
    made.train()
    return [str(kind) for kind in seen[:3]]


def test_evaluation_is_sharded_and_exact(text: str, tmp_path: Path) -> None:
    """The same bits from 1, 2 and 3 processes, the last with batches left over."""
    want = build(text, tmp_path / "one", {}).evaluate()
    for size in (2, 3):
        for one in run_in(size, evaluations_of, text, tmp_path / str(size)):
            for found in one:
                assert found == want, size


def evaluations_of(text: str, folder: Path) -> list[dict]:
    size = dist.get_world_size()
    return [build(text, folder / mode, {"parallel.mode": mode, "global_batch_size": 2 * size}).evaluate()
            for mode in ("ddp", "fsdp")]  # fmt: skip


# ---- resuming ----


@pytest.mark.parametrize("name, optimizer", [("ddp", "adamw"), ("ddp, optimiser in shards", "adamw"), ("fsdp", "adamw"), ("fsdp", "normuon")])
def test_resume_is_bit_equal_on_as_many_processes(text: str, tmp_path: Path, name: str, optimizer: str) -> None:
    size, mode = MODES[name]
    keys = {**mode, "dropout": 0.1, "optim.name": optimizer}
    run_in(size, train, text, tmp_path / "whole", keys)
    run_in(size, train, text, tmp_path / "parts", {**keys, "max_steps": 12, "lr_scheduler": "cosine"})
    # Back to step 6: its checkpoint is the newest, as after a kill.
    for extra in (tmp_path / "parts" / "checkpoints").glob("step-00000012"):
        extra.rename(tmp_path / "aside")
    run_in(size, train, text, tmp_path / "parts", keys, True)
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")
    clock = {"tokens_per_second", "memory_gb", "data_wait", "seconds"}
    strip = [[{k: v for k, v in row.items() if k not in clock} for row in rows_of(tmp_path / n)] for n in ("whole", "parts")]
    assert strip[0] == strip[1]


def test_resume_on_other_numbers_and_modes(text: str, tmp_path: Path) -> None:
    """One process -> DDP of two -> FSDP of two -> hybrid of four -> optimiser in shards -> one process."""
    train(text, tmp_path / "whole", {"max_steps": 24, "save_steps": 4, "eval_steps": 12})
    folder = tmp_path / "moved"
    journey: list[tuple[int, Keys]] = [(1, {}), MODES["ddp"], MODES["fsdp"], MODES["hybrid"],
                                       MODES["ddp, optimiser in shards"], (1, {})]  # fmt: skip
    for leg, (size, mode) in enumerate(journey):
        # Each leg is stopped after four steps; the schedule is that of 24.
        keys = {**mode, "max_steps": 24, "save_steps": 4, "eval_steps": 12}
        arguments = (text, folder, keys, 4 * (leg + 1), leg > 0)
        if size == 1:
            stopped_at(*arguments)
        else:
            run_in(size, stopped_at, *arguments)
    agree(folder, tmp_path / "whole")


def test_a_number_an_output_comes_out_of_shards_and_goes_back(text: str, tmp_path: Path) -> None:
    """NorMuon's means of squares, [M, 1] beside a matrix [M, N]: two processes save them, one goes on, and two again."""
    keys = {"optim.name": "normuon", "max_steps": 12, "save_steps": 4, "eval_steps": 12}
    train(text, tmp_path / "whole", keys)
    folder, sharded_keys = tmp_path / "moved", {**keys, "parallel.mode": "fsdp"}
    run_in(2, stopped_at, text, folder, sharded_keys, 4, False)
    assert checkpoint(folder, 4).tensors("optimizer")["layers.0.mlp.up.weight|second_momentum_buffer"].shape == (128, 1)
    stopped_at(text, folder, keys, 8, True)
    run_in(2, train, text, folder, sharded_keys, True)
    agree(folder, tmp_path / "whole", 1e-3, ("loss", "bpb", "tokens", "learning_rate"))
    for name, tensor in checkpoint(tmp_path / "whole").tensors("optimizer").items():
        if name.endswith("second_momentum_buffer"):
            torch.testing.assert_close(checkpoint(folder).tensors("optimizer")[name], tensor, rtol=0.05, atol=1e-4)


class StopAt(Callback):
    """Asks for a stop in the last process alone."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, context: Context) -> None:
        if context.step == self.step and context.world.rank == context.world.size - 1:
            context.request("stop", "test")


def stopped_at(text: str, folder: Path, keys: Keys, step: int, resume: bool) -> None:
    made = build(text, folder, keys, resume, [StopAt(step)] if step < 24 else [])
    if resume:
        found = made.checkpoints.find_newest()
        assert found is not None and found.step == step - 4
        made.load_checkpoint(found)
    if step == 24:
        assert made.train()["status"] == "finished"
        return
    with pytest.raises(Stopped):
        made.train()
    assert made.state.step == step


def test_a_signal_just_after_they_agreed_counts_at_the_next_step(text: str, tmp_path: Path) -> None:
    """One process that heard it alone would save while the others go on, and all would wait for each other for ever."""
    run_in(2, told_late, text, tmp_path / "run", MODES["ddp"][1])


def told_late(text: str, folder: Path, keys: Keys) -> None:
    made, agree = build(text, folder, keys), Requests.agree

    def late(requests: Requests, *arguments: Any) -> dict[str, Any]:
        agreed = agree(requests, *arguments)
        if made.state.step == 5 and made.world.rank == 1:
            made.callbacks["commands"].control._on_signal(signal.SIGTERM, None)
            made.callbacks["commands"].control._on_signal(signal.SIGUSR1, None)
        return agreed

    Requests.agree = late  # type: ignore[method-assign]
    try:
        with pytest.raises(Stopped) as stopped:
            made.train()
    finally:
        Requests.agree = agree  # type: ignore[method-assign]
    assert made.state.step == 6 and stopped.value.exit_code == 143


def test_sizes_that_do_not_fit_are_refused(text: str, tmp_path: Path) -> None:
    run_in(2, refusals, text, tmp_path)


def refusals(text: str, folder: Path) -> None:
    for keys, words in (
        ({"global_batch_size": 6}, "per_device_train_batch_size may be 1, 3"),
        ({"parallel.mode": "fsdp", "shard_size": 3}, "it may be 1, 2"),
        ({"parallel.mode": "none"}, "there are 2"),
        ({"world_size": 4}, "parallel.world_size = 4, but there are 2"),
        ({"parallel.mode": "fsdp", "cpu_offload": True}, "leave it out"),
        ({"shard_optimizer": True, "optim.name": "muon"}, "works with optim.name = adamw"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(text, folder / "r", keys)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="distributed=False, but several processes were started"):
        World.open(several=False)


def test_a_used_folder_is_refused_everywhere(text: str, tmp_path: Path) -> None:
    train(text, tmp_path / "r", {})
    run_in(2, used_folder, text, tmp_path / "r")


def used_folder(text: str, folder: Path) -> None:
    with pytest.raises((ConfigError, PeerFailed), match="already holds a run"):
        build(text, folder, {})


# ---- faults ----


def test_one_process_alone_is_not_finite(text: str, tmp_path: Path) -> None:
    run_in(2, poisoned, text, tmp_path / "r")


def poisoned(text: str, folder: Path) -> None:
    made = build(text, folder, {"parallel.mode": "ddp", "max_steps": 6})
    run = made.assembly.stepper.run

    def poison(step: int, micro_batches: Any, *rest: Any, **names: Any) -> Any:
        hook = None
        if step == 3 and made.world.rank == 1:
            head = made.model.head.weight
            hook = head.register_hook(lambda gradient: gradient * float("nan"))
        try:
            return run(step, micro_batches, *rest, **names)
        finally:
            if hook is not None:
                hook.remove()

    made.assembly.stepper.run = poison  # type: ignore[method-assign]
    summary = made.train()
    assert summary["skipped_steps"] == 1 and summary["step"] == 6
    assert all(bool(torch.isfinite(p).all()) for p in made.model.parameters())


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_refuses_one_process_stops_none(text: str, tmp_path: Path, mode: str, rank: int) -> None:
    if mode == "ddp" and rank == 1:
        pytest.skip("under ddp only the first process writes")
    run_in(2, refused_once, text, tmp_path / "r", mode, rank)
    saved = checkpoint(tmp_path / "r")
    saved.verify()
    assert not list((tmp_path / "r" / "checkpoints").glob(".tmp*"))
    assert any(json.loads(line)["event"] == "save_failed" for line in (tmp_path / "r" / "events.jsonl").open())


def refused_once(text: str, folder: Path, mode: str, rank: int) -> None:
    made = build(text, folder, {"parallel.mode": mode, "save_steps": 3, "eval_steps": 50})
    original = sharded._hashed if mode == "fsdp" else writer.write_members
    tries = []

    def refuse(*arguments: Any) -> Any:
        tries.append(1)
        if dist.get_rank() == rank and len(tries) == 1:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    setattr(*((sharded, "_hashed") if mode == "fsdp" else (writer, "write_members")), refuse)
    assert made.train()["status"] == "finished"


# ---- saving while training goes on ----


@pytest.mark.parametrize("name", ["alone", "ddp", "fsdp"])
def test_a_save_in_the_background_is_the_same_save(text: str, tmp_path: Path, name: str) -> None:
    size, mode = MODES.get(name, (1, {}))
    for asynchronous in (False, True):
        arguments = (text, tmp_path / str(asynchronous), {**mode, "save_steps": 3, "asynchronous": asynchronous})
        train(*arguments) if size == 1 else run_in(size, train, *arguments)
    for step in (6, 9, 12):
        assert contents(tmp_path / "True", step) == contents(tmp_path / "False", step)
        checkpoint(tmp_path / "True", step).verify()


def test_a_step_waits_only_for_the_copy(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps go on while a save is held up; the next save waits for it, and its error surfaces."""
    go_on, during, original = threading.Event(), [], writer.write_members

    def slow(*arguments: Any) -> Any:
        assert go_on.wait(30)
        return original(*arguments)

    class Watch(Callback):
        def on_log(self, context: Context) -> None:
            if context.step == 5:
                during.append(made.checkpoints.saver.busy)
                go_on.set()

    monkeypatch.setattr(writer, "write_members", slow)
    made = build(text, tmp_path / "r", {"asynchronous": True, "save_steps": 3, "eval_steps": 50}, callbacks=[Watch])
    made.train()
    assert during == [True]
    checkpoint(tmp_path / "r").verify()


def test_an_error_in_the_background_surfaces(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_members", refuse)
    made = build(text, tmp_path / "r", {"asynchronous": True, "save_steps": 2, "eval_steps": 50})
    with pytest.raises(SaveError, match="No space"):
        made.train()
    failures = [line for line in (tmp_path / "r" / "events.jsonl").open() if "save_failed" in line]
    assert len(failures) == 3


def test_averages_and_schedules_are_the_same_in_shards(text: str, tmp_path: Path) -> None:
    keys = {"max_steps": 8, "eval_steps": 4, "save_steps": 8, "optim.ema": 0.9, "batch_size_schedule": [[0, 1], [4, 2]],
            "seq_len_schedule": [[0, 8], [2, 16]]}  # fmt: skip
    train(text, tmp_path / "alone", keys)
    want = checkpoint(tmp_path / "alone", 8)
    for mode in ("ddp", "fsdp"):
        run_in(2, train, text, tmp_path / mode, {**keys, "parallel.mode": mode})
        agree(tmp_path / mode, tmp_path / "alone")
        saved = checkpoint(tmp_path / mode, 8)
        for stem in ("model", "optimizer"):
            got, wanted = saved.tensors(stem), want.tensors(stem)
            assert got.keys() == wanted.keys()
            for key, tensor in wanted.items():
                torch.testing.assert_close(got[key], tensor, atol=2e-4, rtol=1e-3, msg=f"{mode} {stem} {key}")
    assert any(name.endswith("|ema_updates") for name in wanted)
