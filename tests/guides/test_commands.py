"""Every command of every guide is run, in the order in which a reader would type it. What cannot be run here says why.

(README.md: tests/house/test_documents.py. language_models, collatz, coming_from: beside this file. extending: tests/tasks.)
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import make_text, treadle
from tests.guides.commands import DOCS, commands_of, shortened

Typed = Callable[..., str]
# What a line begins with -> why it is not run here.
NETWORK = "needs the network"
ELSEWHERE = {
    "treadle data prepare tinystories": NETWORK,
    "treadle generate hf:": NETWORK,
    "treadle train s3://": "needs a bucket: tests/storage and tests/training/test_mirror.py run it against a server of their own",
    "treadle generate s3://": "needs a bucket: see above",
    "treadle train more.txt --from s3://": "needs a bucket: see above",
    "treadle serve": "serves until it is stopped: tests/serving",
    "treadle chat": "a conversation: tests/serving/test_chat.py",
    "treadle generate runs/hnet --interactive": "a conversation: tests/guides/test_bytes.py",
    "treadle ctl": "speaks to a run that goes on: tests/monitor",
    "treadle train conversations.jsonl --from smollm2": "a model of 135 million parameters: tests/realmodel",
    "treadle eval runs/story --tasks": "the harness fetches arc_easy: tests/evaluation",
    "treadle compare --suite": "trains for minutes: tests/suite",
    "treadle plan --table": "takes up to a minute: tests/planning",
    "treadle plan recipes/gpt2.toml --world 8 --parallel fsdp --rehearse": "eight processes: tests/planning",
}
LARGE = "names a model of 100 million parameters or more; its recipe is composed instead"
ONLY_COMPOSED = ("--preset hnet_bit_1stage", "--model.preset 500m", "--preset slm_base")
DEVICES = "--devices 2"
FAILS = {"treadle generate sent/run": "--trust-code"}  # the guide says so, and what it says is in the error
GUIDES = ["quick_start", "byte_models", "cluster", "data", "dynamics", "fine_tuning", "generation", "huggingface", "hyper_connections", "mixers", "models",
          "object_storage", "pipelines", "planning", "serving", "training", "trust", "control"]  # fmt: skip
# comparing, reports, watching: what they say is shown by tests/suite, tests/reporting and tests/live.
RUN_BY_OTHERS = {"comparing", "reports", "watching", "language_models", "collatz", "coming_from", "extending"}


# The runs that a guide takes for granted; each is the one tiny run under another name.
NEEDS = {
    "fine_tuning": ["austen"], "generation": ["story", "large", "small"], "huggingface": ["story", "bytes"], "serving": ["story"],
    "control": ["story"], "trust": [],
}  # fmt: skip
OWN_CODE = {
    "mine.py": "from treadle.models.transformer import Transformer\n\n\nclass Mine(Transformer):\n    arch = 'mine'\n",
    "my_model.py": "from treadle.models.transformer import Transformer\n\n\nclass MyModel(Transformer):\n    arch = 'my_model'\n",
    "clean.py": "def clean(text):\n    return text.strip()\n\n\ndef is_prose(text):\n    return text.count('{') < 3\n",
}
FLAT = {"model_type": "simplified_slm", "hidden_size": 16, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader of the guides has it: texts, conversations, pairs, files of one's own, and one trained run."""
    from treadle import train

    folder = tmp_path_factory.mktemp("workshop")
    for number, name in enumerate(("story", "other")):
        (folder / f"{name}.txt").write_text(make_text(300, seed=number))
    (folder / "unseen.txt").write_text(make_text(20, seed=2))
    for name in ("stories", "text"):
        (folder / name).mkdir()
        for number in range(3):
            (folder / name / f"{number}.txt").write_text(make_text(100, seed=number))
    (folder / "stories.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in make_text(300).splitlines() if line))
    ask = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a wheel."}]
    (folder / "conversations.jsonl").write_text((json.dumps({"messages": ask}) + "\n") * 60)
    pair = {"prompt": "What is it? ", "chosen": "A wheel.", "rejected": "Nothing."}
    (folder / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 60)
    (folder / "prompts.txt").write_text("The\nShe\n")
    (folder / "model.json").write_text(json.dumps(FLAT))
    for name, code in OWN_CODE.items():
        (folder / name).write_text(code)
    (folder / "recipes").symlink_to(DOCS.parent / "recipes")
    (folder / "RECIPE.toml").symlink_to(DOCS.parent / "recipes" / "austen.toml")
    shape = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "max_position_embeddings": 1024}
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.chdir(folder)
    train("story.txt", quiet=True, output_dir="made", max_steps=2, batch_size=2, seq_len=32, eval_rows=2, sample_tokens=0, num_workers=0,
          tokenizer={"name": "byte"}, **shape)  # type: ignore[arg-type]
    monkeypatch.undo()
    return folder


def before(guide: str, folder: Path, typed: Typed) -> None:
    """What a guide takes for granted."""
    for name in NEEDS.get(guide, []):
        shutil.copytree("made", f"runs/{name}")
    if guide in ("fine_tuning", "huggingface"):  # a folder of transformers', adapters of peft's above it, a file of llama.cpp's
        typed("export", "made", "--format", "huggingface", "--output", "some-folder")
        typed(*shortened("treadle train other.txt --from some-folder --lora_rank 2 --run_name adapted"))
        shutil.copytree("runs/adapted", "runs/tuned")
        typed("export", "runs/adapted", "--output", "some-adapter")
        shutil.copytree("some-adapter", "tuned-by-peft")
        typed("export", "made", "--format", "gguf", "--output", "small.gguf")
    if guide == "trust":  # what somebody has sent
        sender = {"TREADLE_CONFIG_HOME": str(folder / "sender")}  # whose list of trusted code is another one
        (folder / "sent").mkdir()
        shutil.copy("my_model.py", "sent/my_model.py")
        line = "treadle train story.txt --model.arch sent/my_model.py:MyModel --output_dir sent/run"
        assert treadle(*shortened(line), cwd=folder, **sender).returncode == 0


def reason(line: str) -> str | None:
    return next((why for begin, why in ELSEWHERE.items() if line.startswith(begin)), None)


@pytest.mark.parametrize("guide", GUIDES)
def test_its_commands_run(
    guide: str, workshop: Path, tmp_path: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / guide
    shutil.copytree(workshop, folder, symlinks=True)
    monkeypatch.chdir(folder)
    before(guide, folder, typed)
    left = {}
    for line in dict.fromkeys(commands_of(guide)):
        why, words = reason(line), shortened(line.replace(" --devices 2", "").replace(" --parallel ddp", "").replace(" --parallel fsdp", "") if DEVICES in line else line)
        if why is None and any(word in line for word in ONLY_COMPOSED):
            composed(line)
            why = LARGE
        elif why is None:
            why = "two processes (tests/distributed); run in one" if DEVICES in line else None
            try:
                typed(*words)
            except Exception as problem:
                if str(problem).replace("\n", " ").find(FAILS.get(line, "\0")) < 0:
                    raise AssertionError(f"docs/{guide}.md: treadle {shlex.join(words)}: {problem!r}") from problem
            else:
                assert line not in FAILS, f"docs/{guide}.md says that this is refused: {line}"
        if why is not None:
            left[line] = why
    with capsys.disabled():
        for line, why in left.items():
            print(f"\n  docs/{guide}.md, not run as it stands: {line}: {why}", end="")


def composed(line: str) -> None:
    """A command whose recipe alone is looked at."""
    from treadle.recipe import compose
    from treadle.settings import parse_flags
    from treadle.start import Request

    words, flags = parse_flags(shlex.split(line)[2:])
    flags = {name: value for name, value in flags.items() if name not in ("memory", "devices")}
    assert compose(Request(words[0] if words else None, flags).layers()).preset is not None


def test_every_guide_is_run_by_a_test() -> None:
    with_commands = {path.stem for path in DOCS.glob("*.md") if commands_of(path.stem)}
    assert {*GUIDES} <= with_commands <= {*GUIDES, *RUN_BY_OTHERS}
    lines = {line for guide in {*GUIDES, *with_commands} for line in commands_of(guide)}
    assert all(any(line.startswith(begin) for line in lines) for begin in ELSEWHERE), "a reason for a line that is in no guide"


# Lines of guides that are no verb of treadle's: what begins them -> why they are not run here.
OTHER_PROGRAMS = {
    "python -m bench": "two minutes to an hour: tests/bench runs its parts", "python -m tools.": "fetches or takes minutes", "torchrun": "tests/distributed",
    "python -m pip": "installs", "python3 -m venv": "installs", "pip": "installs", "pipx": "installs", "make": "the project's own checks", "export": "sets a variable",
}  # fmt: skip


def test_other_lines_say_why_they_are_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    import re

    for path in sorted(DOCS.glob("*.md")):
        for line in re.findall(r"^ {4}((?:python3?|torchrun|pip|pipx|make|export) .*)$", path.read_text(), flags=re.M):
            why = next((why for begin, why in OTHER_PROGRAMS.items() if line.startswith(begin)), None)
            assert why is not None, f"docs/{path.name}: {line}: run it in a test, or say here why not"
            module = re.match(r"python -m ((?:bench|tools)[\w.]*)", line)
            place = DOCS.parent / module[1].replace(".", "/") if module else DOCS
            assert place.with_suffix(".py").is_file() or place.is_dir(), f"docs/{path.name}: there is no {place}"
            with capsys.disabled():
                print(f"\n  docs/{path.name}, not run: {line.partition('#')[0].strip()}: {why}", end="")
