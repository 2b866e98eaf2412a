"""The Collatz script's users: their constants as a file and as flags, and the commands of docs/collatz.md."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

from tests.guides.commands import DOCS
from treadle.settings import load_table

SHORT = {"max_steps": "2", "batch_size": "8", "eval_rows": "8", "num_workers": "0", "model.hidden_size": "32", "model.num_layers": "1", "model.num_heads": "2"}


def test_the_constants_of_the_script(in_folder: Path, typed: Callable[..., str]) -> None:
    text = (DOCS / "coming_from.md").read_text()
    section = text[text.index("## The Collatz script") :]
    (in_folder / "mine.toml").write_text(re.findall(r"```toml\n(.*?)```", section, flags=re.S)[0])
    commands = [shlex.split(line)[1:] for line in re.findall(r"```bash\n(.*?)```", section, flags=re.S)[0].splitlines()]
    assert len(commands) == 2
    for words in commands:
        said = typed(*words, "--eval_rows", "8")
        assert "Finished at step 4" in said and re.search(r"^Step 4 \| Loss: \d", said, flags=re.M)
    for run in ("mine", "script"):
        kept = load_table(in_folder / "runs" / run / "config.toml")
        assert kept["model"]["arch"] == "collatz" and kept["model"]["hidden_size"] == 32 and kept["train"]["objective"] == "collatz"
        assert kept["train"]["per_device_train_batch_size"] == 16


def test_the_commands_of_the_document_train(in_folder: Path, typed: Callable[..., str]) -> None:
    text = (DOCS / "collatz.md").read_text()
    lines = [line.partition("#")[0] for block in re.findall(r"```bash\n(.*?)```", text, flags=re.S) for line in block.splitlines()]
    lines += re.findall(r"`(treadle train [^`]*)`", text)
    training = [shlex.split(line)[1:] for line in lines if re.match(r"treadle (train|check) ", line)]
    assert len(training) >= 6
    for number, words in enumerate(training):
        words = [{"B": "24", "N": "2", "fp16": "fp32", "bf16": "fp32"}.get(word, word) for word in words]
        given = {key: value for key, value in SHORT.items() if f"--{key}" not in words}
        shape = [part for key, value in given.items() for part in (f"--{key}", value)]
        for flag, short in (("--batch_size", "8"), ("--max_steps", "2")):
            if flag in words:
                words[words.index(flag) + 1] = short
        more = [] if words[0] == "check" else ["--output_dir", f"runs/{number}"]
        said = typed(*words, *shape, *more)
        assert "It works" in said if words[0] == "check" else "Finished at step 2" in said
