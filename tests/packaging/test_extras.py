"""Without an extra each feature that needs it ends with exit code 2 and the name of the extra; the rest works."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import flags, make_text
from tests.packaging.test_package import EXTRAS, NOT_OF_THE_CODE, name_of
from treadle import cli
from treadle.collatz import blocks

MODULES = {"lm-eval": "lm_eval", "indexed-gzip": "indexed_gzip"}
TRAINED: list[Path] = []  # where its runs folder is
TRAIN = ["train", "story.txt", *flags(max_steps=1)]


def _text(folder: Path) -> None:
    (folder / "story.txt").write_text(make_text(50))


def _gz(folder: Path) -> None:
    (folder / "story.txt.gz").write_bytes(gzip.compress(make_text(50).encode()))


def _run(folder: Path) -> None:
    """A trained run in runs/story; trained once for all of this file."""
    _text(folder)
    if not TRAINED:
        assert said([*TRAIN, "--report_to", "csv"]) == 0
        TRAINED.append((folder / "runs").resolve())
    elif TRAINED[0].parent != folder:
        (folder / "runs").symlink_to(TRAINED[0])


def _some(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(b"GGUF\x03\0\0\0" + b"\0" * 64) and None


# extra -> (what has to be there, what to type), one for each feature that asks for it
FEATURES: dict[str, list[tuple[Callable[[Path], None], list[str]]]] = {
    "hf": [(_text, ["train", *TRAIN[2:], "--dataset_name", "some/set"]), (_some("m.gguf"), ["generate", "m.gguf"]),
           (_text, ["generate", "some/model"]), (_run, ["export", "runs/story", "--format", "gguf"])],
    "parquet": [(_some("story.parquet"), ["train", "story.parquet", *TRAIN[2:]])],
    "compressed": [(_gz, ["train", "story.txt.gz", *TRAIN[2:]]), (_some("story.txt.zst"), ["train", "story.txt.zst", *TRAIN[2:]])],
    "remote": [(_text, ["train", "s3://bucket/story.txt", *TRAIN[2:]]), (_text, [*TRAIN, "--checkpoint.mirror", "s3://bucket/runs"])],
    "sentencepiece": [(_some("t.model"), ["train", "austen", *flags(max_steps=1, tokenizer__name="t.model")])],
    "wandb": [(_text, [*TRAIN, "--report_to", "csv,wandb"])],
    "collatz": [(_text, ["collatz", "verify", "1", "1000", "--path", "numba"])],
    "ray": [(_text, ["collatz", "verify", "1", "1000", "--cluster", "ray"])],
    "deepspeed": [(_text, [*TRAIN, "--parallel.mode", "deepspeed"])],
    "serve": [(_run, ["serve", "runs/story"])],
    "eval": [(_run, ["eval", "runs/story", "--tasks", "piqa"])],
}  # fmt: skip
CASES = [(extra, number) for extra, cases in FEATURES.items() for number in range(len(cases))]


def said(line: list[str]) -> int:
    """The exit code of the command line, in this process, so that modules stay hidden from it."""
    before, sys.argv = sys.argv, ["treadle", *line]
    try:
        return cli._run()
    finally:
        sys.argv = before


def hide(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only this extra brings cannot be imported, nor found."""
    for requirement in EXTRAS[extra]:
        module = MODULES.get(name_of(requirement), name_of(requirement))
        for loaded in [name for name in sys.modules if name.startswith(module + ".")]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
        if module == "numba":  # whether it is there is remembered: of an earlier test, and for a later one
            monkeypatch.setattr(blocks, "installed", blocks.installed.__wrapped__)
        if module == "transformers":
            monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # type: ignore[arg-type]


def test_a_data_set_takes_the_place_of_the_bundled_text() -> None:
    """A command that names no recipe and --dataset_name: the default recipe's text would contradict it."""
    from treadle.recipe import Layer, compose, typed_layers

    recipe = compose(typed_layers(None, Layer({"dataset_name": "some/set"}, "flag", from_text=True)))
    assert (recipe.data.path, recipe.data.dataset_name, str(recipe.folder)) == (None, "some/set", "runs/set")
    assert recipe.data.seq_len == compose(typed_layers(None, Layer({}, "flag"))).data.seq_len


def test_every_extra_has_a_case() -> None:
    assert FEATURES.keys() == EXTRAS.keys() - NOT_OF_THE_CODE


def test_doctor_tells_of_every_extra() -> None:
    from treadle.examine import EXTRAS as TOLD

    packages = {extra: {MODULES.get(name_of(r), name_of(r)) for r in EXTRAS[extra]} for extra in EXTRAS.keys() - NOT_OF_THE_CODE}
    assert {extra: set(modules) for extra, modules in TOLD.items()} == packages


@pytest.mark.parametrize("extra, number", CASES, ids=lambda x: str(x))
def test_what_is_missing_is_named(
    extra: str, number: int, in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, line = FEATURES[extra][number]
    prepare(in_folder)
    hide(extra, monkeypatch)
    capsys.readouterr()
    assert said(line) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and f"pip install 'treadle[{extra}]'" in error
    assert error.count("\n") == 1, "one line"
