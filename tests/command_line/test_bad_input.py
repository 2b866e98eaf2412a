"""Bad input: a clear message that says what to do, the right exit code, nothing written or lost."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY, flags, make_text, treadle
from treadle.checkpoint.layout import checkpoint_name, steps_in
from treadle.errors import TreadleError
from treadle.monitor.console import Console
from treadle.start import Request, train


def attempt(target: object, folder: Path, allow: tuple[str, ...] = (), **keys: Any) -> TreadleError:
    """Trains in this process and returns the error it ends with."""
    merged = {
        **TINY,
        "max_steps": "2",
        "output_dir": str(folder),
        **{k.replace("__", "."): str(v) for k, v in keys.items()},
    }
    with pytest.raises(TreadleError) as caught:
        train(Request(str(target), merged, allow_change=allow), Console(quiet=True))
    return caught.value


def succeed(target: object, folder: Path, allow: tuple[str, ...] = (), **keys: Any) -> dict:
    merged = {
        **TINY,
        "max_steps": "2",
        "output_dir": str(folder),
        **{k.replace("__", "."): str(v) for k, v in keys.items()},
    }
    return train(Request(str(target), merged, allow_change=allow), Console(quiet=True))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"max_stps": 5}, "max_steps"),
        ({"hiden_size": 64}, "hidden_size"),
        ({"train__max_stps": 5}, "max_steps"),
        ({"learning_rate": -1}, "greater than 0"),
        ({"learning_rate": "nan"}, "finite"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"batch_size": 2.5}, "valid integer"),
        ({"gradient_accumulation_steps": 0}, "greater than or equal to 1"),
        ({"lr_scheduler_type": "cosin"}, "cosine"),
        ({"precision": "bf61"}, "bf16"),
        ({"num_heads": 5}, "does not divide by num_heads"),
        ({"num_layers": 0}, "greater than or equal to 1"),
        ({"model__arch": "tranformer"}, "transformer"),
        ({"model__preset": "nanoo"}, "nano"),
        ({"fp16": "true", "bf16": "true"}, "given twice"),
        ({"lr": 0.1, "learning_rate": 0.2}, "given twice"),
        ({"run_name": "../../evil", "output_dir": "none"}, "run_name"),
        ({"device": "cuda:7"}, "--device cpu"),
        ({"global_batch_size": 6}, "per_device_train_batch_size may be 1, 2, 3, 6"),
        ({"model__vocab_size": 100}, "tokenizer"),
        ({"tokenizer__name": "no-such-tokenizer"}, "treadle tokenizer train"),
        ({"gradient_checkpointing": "[7]"}, "0 to 1"),
        ({"log__profile": "x"}, "START:STEPS"),
        ({"data__weights": "[1.0, 2.0]"}, "2 numbers for 1 path"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_configuration(text_file: Path, tmp_path: Path, keys: dict, says: str) -> None:
    folder = tmp_path / "run"
    if keys.get("output_dir") == "none":
        keys = {k: v for k, v in keys.items() if k != "output_dir"}
        with pytest.raises(TreadleError) as caught:
            train(Request(str(text_file), {"run_name": "../../evil"}), Console(quiet=True))
        problem = caught.value
    else:
        problem = attempt(text_file, folder, **keys)
    assert problem.exit_code == 2 and says in str(problem), str(problem)
    assert not folder.exists()  # nothing was written


def test_missing_and_empty_files(in_folder: Path) -> None:
    problem = attempt("nowhere.txt", in_folder / "run")
    assert problem.exit_code == 2 and "does not exist" in str(problem)
    (in_folder / "empty.txt").touch()
    problem = attempt("empty.txt", in_folder / "run")
    assert problem.exit_code == 2 and "empty" in str(problem)
    (in_folder / "blank.jsonl").write_text("\n\n\n")
    problem = attempt("blank.jsonl", in_folder / "run")
    assert problem.exit_code == 2 and "no text" in str(problem)
    (in_folder / "folder").mkdir()
    problem = attempt("folder", in_folder / "run")
    assert problem.exit_code == 2 and "holds no" in str(problem)
    problem = attempt("aussten", in_folder / "run")
    assert problem.exit_code == 2 and "austen" in str(problem)
    assert not (in_folder / "run").exists()


def test_invalid_utf8_and_nul_bytes_name_the_place(in_folder: Path) -> None:
    good = make_text(100).encode()
    (in_folder / "latin.txt").write_bytes(good + b"caf\xe9 au lait\n" + good)
    problem = attempt("latin.txt", in_folder / "run", on_bad="error")
    line = good.count(b"\n") + 1
    assert problem.exit_code == 65 and f"latin.txt, line {line}, byte {len(good) + 3}" in str(problem)
    assert "on_bad skip" in str(problem)
    succeed("latin.txt", in_folder / "run")  # by default the line is left out and counted
    (in_folder / "binary.txt").write_bytes(make_text(100).encode("utf-16"))
    problem = attempt("binary.txt", in_folder / "run2")
    assert problem.exit_code in (2, 65) and "NUL byte" in str(problem)


def test_broken_json_lines(in_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"text": make_text(3, seed=n)}) for n in range(150)]
    lines[7] = '{"text": "cut'
    lines[9] = '{"txt": "another key"}'
    lines[11] = '{"text": 5}'
    (in_folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    succeed("rows.jsonl", in_folder / "run")
    err = capfd.readouterr().err
    assert "3 malformed" in err and "line 8" in err and "broken JSON" in err and "no key 'text'" in err
    problem = attempt("rows.jsonl", in_folder / "run2", on_bad="error")
    assert problem.exit_code == 65 and "line 8" in str(problem)
    (in_folder / "worse.jsonl").write_text("\n".join(["{"] * 40 + lines) + "\n")
    problem = attempt("worse.jsonl", in_folder / "run3")
    assert problem.exit_code == 65 and "43 of 190" in str(problem) and "bad_limit" in str(problem)


def test_a_huge_line_is_fine(in_folder: Path) -> None:
    (in_folder / "huge.jsonl").write_text(json.dumps({"text": "word " * 1_000_000}) + "\n")
    assert succeed("huge.jsonl", in_folder / "run")["step"] == 2


def test_another_shape_is_refused(text_file: Path, tmp_path: Path) -> None:
    succeed(text_file, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    problem = attempt(text_file, tmp_path / "run", hidden_size=64, max_steps=4)
    assert problem.exit_code == 2 and "hidden_size was 32" in str(problem) and "--fresh" in str(problem)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    other = tmp_path / "other"
    succeed(text_file, other, hidden_size=64)
    problem = attempt(text_file, tmp_path / "run", max_steps=4, resume_from_checkpoint=other)
    assert problem.exit_code == 2 and "another shape" in str(problem)


def test_guarded_changes_need_the_flag_they_print(text_file: Path, tmp_path: Path) -> None:
    succeed(text_file, tmp_path / "run")
    for key, value in (("seed", 5), ("global_batch_size", 8), ("seq_len", 16)):
        problem = attempt(text_file, tmp_path / "run", **{key: value}, max_steps=3)
        full = str(problem).rsplit(" ", 1)[1]
        assert problem.exit_code == 2 and full.endswith(key), str(problem)
    problem = attempt(text_file, tmp_path / "run", ("seq_len",), seq_len=16, max_steps=3)  # the data differ too
    assert "--allow-change data" in str(problem)
    assert succeed(text_file, tmp_path / "run", ("data",), seq_len=16, max_steps=3)["step"] == 3
    # What may always change: micro-batch (the global batch stays), accumulation, workers, checkpointing, steps.
    assert (
        succeed(
            text_file, tmp_path / "run", ("data",), seq_len=16, batch_size=2, gradient_checkpointing="true", max_steps=4
        )["step"]
        == 4
    )
    assert "global_batch_size = 4" in (tmp_path / "run" / "config.toml").read_text()


def test_changed_text_is_refused(in_folder: Path) -> None:
    (in_folder / "a.txt").write_text(make_text(200))
    succeed("a.txt", in_folder / "run")
    (in_folder / "a.txt").write_text(make_text(200, seed=1))
    problem = attempt("a.txt", in_folder / "run", max_steps=4)
    assert problem.exit_code == 2 and "--allow-change data" in str(problem)


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "swap"])
def test_a_damaged_newest_checkpoint_falls_back(
    text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], harm: str
) -> None:
    folder = tmp_path / "run"
    succeed(text_file, folder, max_steps=4, save_steps=2)
    root = folder / "checkpoints"
    newest = root / checkpoint_name(4)
    victim = newest / "model.safetensors"
    data = bytearray(victim.read_bytes())
    if harm == "truncate":
        victim.write_bytes(data[:-7])
    elif harm == "flip":
        data[len(data) // 2] ^= 4
        victim.write_bytes(data)
    elif harm == "remove":
        (newest / "run_state.json").unlink()
    else:
        shutil.copy(root / checkpoint_name(2) / "model.safetensors", victim)
    (root / "best.json").unlink()
    assert succeed(text_file, folder, max_steps=4, save_steps=2)["step"] == 4
    err = capfd.readouterr().err
    assert "step-00000004 is damaged" in err and victim.parent.name in err
    assert any(p.name.startswith("damaged-") for p in root.iterdir())  # kept, not deleted
    assert steps_in(root)[0] == 4


def test_all_damaged_is_65_never_a_fresh_start(text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    succeed(text_file, folder)
    for manifest in (folder / "checkpoints").glob("*/manifest.json"):
        manifest.write_text("{}")
    for _ in range(2):  # the second time they are set aside already
        problem = attempt(text_file, folder, max_steps=4)
        assert problem.exit_code == 65 and "damaged" in str(problem) and "--fresh" in str(problem)


def test_a_full_disk_keeps_what_there_is(text_file: Path, tmp_path: Path) -> None:
    """A file-size limit stands for the full disk: the save fails with 74, the earlier checkpoint loads."""
    folder = tmp_path / "run"
    succeed(text_file, folder)
    line = ["train", text_file, "--output_dir", folder, *flags(max_steps=6)]
    import resource
    import subprocess
    import sys

    failed = subprocess.run(
        [sys.executable, "-m", "treadle", *map(str, line)], capture_output=True, text=True, stdin=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
    )  # fmt: skip
    assert failed.returncode == 74, failed.stderr
    assert "could not be written" in failed.stderr and "--checkpoint_dir" in failed.stderr
    assert steps_in(folder / "checkpoints")[0] == 2
    assert not [p for p in (folder / "checkpoints").iterdir() if p.name.startswith(".tmp")]
    assert succeed(text_file, folder, max_steps=6)["step"] == 6


def test_pickles_are_never_read(tmp_path: Path, text_file: Path) -> None:
    """A checkpoint file that would run code when unpickled is refused by name, unread."""
    marker = tmp_path / "executed"
    evil = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    for name in ("model.pt", "model.bin"):
        (tmp_path / name).write_bytes(evil)
        out = treadle("generate", tmp_path / name)
        assert out.returncode == 2 and "pickle" in out.stderr
    (tmp_path / "tokenizer.json").write_bytes(evil)
    assert attempt(text_file, tmp_path / "run", tokenizer__name=tmp_path / "tokenizer.json").exit_code == 2
    for name in ("data.jsonl", "data.txt", "data.bin", "data.parquet"):
        (tmp_path / name).write_bytes(evil)
        with contextlib.suppress(TreadleError):  # an error, or (as text) nothing but text
            succeed(tmp_path / name, tmp_path / "run")
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    (tmp_path / "data.pkl").write_bytes(evil)
    assert attempt(tmp_path / "data.pkl", tmp_path / "run").exit_code == 2
    assert not marker.exists()


def test_messages_reach_the_terminal_as_one_line(tmp_path: Path) -> None:
    out = treadle("train", tmp_path / "nowhere.txt", cwd=tmp_path)
    assert out.returncode == 2 and out.stderr.startswith("error: ") and out.stderr.count("\n") == 1
    for line in (["eval", "nowhere"], ["generate", "nowhere"], ["doctor", "nowhere"], ["data", "stats", "nowhere.txt"]):
        out = treadle(*line, cwd=tmp_path)
        assert out.returncode == 2 and "Traceback" not in out.stderr, out.stderr


def test_several_paths_and_a_schedule_of_weights_as_typed(text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(make_text(300, seed=3))
    out = treadle("check", "--data.path", f"{text_file},{other}", "--data.weights", "[[0, .9, .1], [10, .5, .5]]", *flags())
    assert out.returncode == 0, out.stderr
    out = treadle("check", "--data.path", f"{text_file},{other}", "--data.weights", "[[0, .9, .1], [0, .5, .5]]", *flags())
    assert out.returncode == 2 and "growing steps" in out.stderr


def test_a_compressed_file_is_a_text(in_folder: Path) -> None:
    import gzip

    (in_folder / "story.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps({"text": make_text(4, seed=n)}) for n in range(200)).encode()))
    out = treadle("train", "story.jsonl.gz", *flags(max_steps=2), cwd=in_folder)
    assert out.returncode == 0 and (in_folder / "runs" / "story").is_dir(), out.stderr
