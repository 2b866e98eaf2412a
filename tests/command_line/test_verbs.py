"""The verbs as a user types them, each in a process of its own, on real text."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import flags, make_text, treadle


def ok(*line: object, **keys: object) -> str:
    out = treadle(*line, **keys)  # type: ignore[arg-type]
    assert out.returncode == 0, out.stderr + out.stdout
    return out.stdout


@pytest.fixture(scope="module")
def run(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verbs")
    out = ok(
        "train", text_file, *flags(max_steps=12, save_steps=6, eval_steps=6, sample_tokens=8, run_name="r"), cwd=folder
    )
    assert "step 12/12" in out and "evaluation at step 12" in out and "Finished at step 12: runs/r" in out
    return folder


def test_a_run_folder_holds_what_it_should(run: Path) -> None:
    folder = run / "runs" / "r"
    for name in ("config.toml", "metrics.jsonl", "training_log.csv", "eval_log.csv", "events.jsonl", "summary.json",
                 "environment.json", "checkpoints/best.json"):  # fmt: skip
        assert (folder / name).is_file(), name
    assert list((folder / "tensorboard").iterdir()) and list((folder / "samples").iterdir())
    checkpoint = folder / "checkpoints" / "step-00000012"
    members = {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()}
    assert members == {"model.safetensors", "optimizer.safetensors", "run_state.json", "config.toml", "manifest.json",
                       "tokenizer/treadle_tokenizer.json"}  # fmt: skip
    assert "NaN" not in (folder / "metrics.jsonl").read_text()


def test_the_saved_configuration_is_a_recipe(run: Path, tmp_path: Path) -> None:
    ok("train", run / "runs" / "r" / "config.toml", "--output_dir", tmp_path / "again", "--run_name", "again")
    a, b = ((f / "metrics.jsonl").read_text().splitlines()[3] for f in (run / "runs" / "r", tmp_path / "again"))
    assert json.loads(a)["loss"] == json.loads(b)["loss"]


def test_eval_and_generate(run: Path) -> None:
    out = ok("eval", "runs/r", "runs/r@6", "--samples", 1, cwd=run)
    assert "uniform: bpb 8.0000" in out and "runs/r@6" in out
    assert (run / "runs" / "r" / "results" / "evaluation_results.json").is_file()
    one = ok("generate", "runs/r", "--prompt", "The house", "--max-tokens", 20, cwd=run)
    assert one.startswith("The house") and one == ok(
        "generate", "--prompt", "The house", "--max-new-tokens", 20, cwd=run
    )
    assert ok("generate", "runs/r", "--num-samples", 2, "--max-tokens", 5, cwd=run).count("---") == 1
    (run / "p.txt").write_text("The\nShe\n")
    assert "2 continuations" in ok(
        "generate", "last", "--prompt-file", "p.txt", "--output-file", "o.txt", "--max-tokens", 5, cwd=run
    )


def test_interactive_generation_reads_its_input(run: Path) -> None:
    out = subprocess.run([sys.executable, "-m", "treadle", "generate", "last", "-i", "--max-tokens", "5"], cwd=run,
                         input="/temp 0.5\nThe house\n/quit\n", capture_output=True, text=True)  # fmt: skip
    assert out.returncode == 0 and "temperature 0.5" in out.stdout and "The house" in out.stdout


def test_data_and_tokenizer_verbs(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": make_text(3, seed=n)}) for n in range(120)))
    out = ok(
        "data", "prepare", "t.jsonl", "--output", "prepared", "--vocab-size", 300, "--tokenizer", "bpe", cwd=tmp_path
    )
    assert "held out: whole documents" in out and "treadle train --data.path prepared" in out
    out = ok("data", "stats", "prepared", "--seq-len", 64, cwd=tmp_path)
    assert "packing best_fit" in out and "% filled" in out
    assert "document 0: " in ok("data", "show", "t.jsonl", "--packing", "best_fit", "--row", 3, cwd=tmp_path)
    out = ok("data", "show", "t.jsonl", "--streaming", "--rows", 2, "--packing", "best_fit", "--seq-len", 512, cwd=tmp_path)
    assert "row 1" in out and "[<end>: no label]" in out and "padding: " in out
    out = ok("data", "stats", "t.jsonl", "--streaming", cwd=tmp_path)
    assert "120 documents, 0 malformed" in out and "####" in out
    assert "right: 120 documents" in ok("data", "check", "t.jsonl", "--packing", "next_fit", cwd=tmp_path)
    assert "train: right: " in ok("data", "check", "prepared", cwd=tmp_path)
    ok("tokenizer", "train", "t.jsonl", "--kind", "unigram", "--vocab-size", 280, "--output", "tok", cwd=tmp_path)
    assert "unigram, 280 tokens" in ok("tokenizer", "show", "tok", cwd=tmp_path)
    keys = flags(max_steps=2)
    del keys[keys.index("--tokenizer.name") : keys.index("--tokenizer.name") + 2]
    assert "2 steps" in ok("train", "--data.path", "prepared", "--run_name", "p", *keys, cwd=tmp_path)
    assert "1 documents" not in ok("data", "stats", "t.jsonl", "--tokenizer", "tok", cwd=tmp_path)


def test_lists_help_and_doctor(run: Path) -> None:
    assert "gpt2_medium" in ok("models") and "austen" in ok("recipes")
    out = ok("train", "--help")
    assert "--learning_rate" in out and "Also: lr." in out and "--model.arch NAME" in out
    assert "--model.rope_theta" in ok("train", "--model.arch", "transformer", "--help")
    assert "cores" in ok("doctor")
    assert "training would go on from step 12" in ok("doctor", "runs/r", cwd=run)


def test_doctor_reports_damage(run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run / "runs" / "r", tmp_path / "r")
    victim = tmp_path / "r" / "checkpoints" / "step-00000012" / "optimizer.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    out = treadle("doctor", tmp_path / "r")
    assert out.returncode == 65 and "step-00000012: DAMAGED" in out.stdout and "would go on from step 6" in out.stdout


def test_a_terminal_gets_a_live_line(text_file: Path, tmp_path: Path) -> None:
    """In a pseudo-terminal: a progress bar that is redrawn, with loss and tokens a second."""
    main, side = pty.openpty()
    line = [
        sys.executable,
        "-m",
        "treadle",
        "train",
        str(text_file),
        "--output_dir",
        str(tmp_path / "r"),
        *flags(max_steps=30),
    ]
    process = subprocess.Popen(
        line, stdin=side, stdout=side, stderr=side, env={**os.environ, "COLUMNS": "140", "TERM": "xterm"}
    )
    os.close(side)
    seen = b""
    while True:
        try:
            seen += os.read(main, 65536)
        except OSError:
            break
    assert process.wait() == 0
    assert b"step 30/30" in seen and b"tok/s" in seen and b"loss" in seen and b"\x1b[" in seen and b"Finished" in seen


def test_an_explicit_resume_from_an_older_step_keeps_everything(run: Path, tmp_path: Path, text_file: Path) -> None:
    import shutil

    shutil.copytree(run / "runs" / "r", tmp_path / "r")
    before = (tmp_path / "r" / "metrics.jsonl").read_text()
    keys = flags(max_steps=12, save_steps=6, eval_steps=6, sample_tokens=8)
    out = ok("train", text_file, "--output_dir", tmp_path / "r", *keys, "--resume_from", f"{tmp_path}/r@6")
    assert "Resumed from step 6" in out and "are kept in" in out
    (segment,) = (tmp_path / "r" / "segments").iterdir()
    assert (segment / "metrics.jsonl").read_text() == before and (segment / "step-00000012" / "manifest.json").is_file()
    steps = [
        json.loads(r)["step"]
        for r in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
        if "learning_rate" in r
    ]
    assert steps == list(range(1, 13))


def test_an_explicit_resume_is_not_repeated_by_the_stored_configuration(run: Path) -> None:
    assert "resume_from_checkpoint" not in (run / "runs" / "r" / "config.toml").read_text()


def test_an_architecture_of_ones_own(tmp_path: Path, text_file: Path) -> None:
    """--model.arch file.py:Class trains, resumes and generates like a built-in one."""
    (tmp_path / "mine.py").write_text(
        "from treadle.models.transformer import Transformer\n\n\nclass Mine(Transformer):\n    arch = 'mine'\n"
    )
    line = ["train", text_file, "--run_name", "m", "--model.arch", "mine.py:Mine"]
    ok(*line, *flags(max_steps=2), cwd=tmp_path)
    assert "Resumed from step 2" in ok(*line, *flags(max_steps=3), cwd=tmp_path)
    ok("generate", "runs/m", "--max-tokens", 3, cwd=tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    out = treadle("train", text_file, "--output_dir", tmp_path / "file" / "run", *flags(max_steps=1))
    assert out.returncode == 2 and "Traceback" not in out.stderr and "check the path" in out.stderr


def test_several_processes_are_refused(text_file: Path, tmp_path: Path) -> None:
    out = treadle("train", text_file, "--output_dir", tmp_path / "r", *flags(max_steps=1), WORLD_SIZE="2")
    assert out.returncode == 2 and "WORLD_SIZE = 2 without RANK" in out.stderr
