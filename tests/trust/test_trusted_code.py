"""Which code may run: what is typed runs, what a file names is refused until the user says so, and a run remembers."""

from __future__ import annotations

import importlib.util
import os
import py_compile
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trust.conftest import MODEL, Code
from treadle import trusted_code
from treadle.errors import ConfigError
from treadle.models.catalogue import MODELS
from treadle.monitor.sinks import SINKS
from treadle.recipe import compose, from_leaf_names
from treadle.start import Request, configure
from treadle.text.base import TOKENIZERS


def named(code: Code, cls: str = "Mine") -> str:
    return f"{code.path}:{cls}"


def started(code: Code, folder: Path) -> Path:
    """A run folder as training leaves it, by a user who typed the name."""
    (folder.parent / "story.txt").write_text("A story.")
    recipe = configure(Request(str(folder.parent / "story.txt"), {"model.arch": named(code)}), folder)
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    (folder / "config.toml").write_text(recipe.to_toml())
    return folder


def test_a_name_from_a_file_is_refused_with_the_flag_that_allows_it(code: Code, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[model]\narch = "{named(code)}"\n')
    with pytest.raises(ConfigError, match=rf"--trust-code {code.path}"):
        compose(Request(str(recipe)).layers())
    assert not code.ran
    assert compose(Request(str(recipe), trust_code=[str(code.path)]).layers()).arch == named(code)
    assert code.ran and MODELS.get(named(code)).arch == "mine"


def test_a_file_of_model_keys_is_a_file(code: Code, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(f'{{"model_type": "{named(code)}"}}')
    with pytest.raises(ConfigError, match="--trust-code"):
        compose(Request("austen", {"model.config_file": str(tmp_path / "model.json")}).layers())
    assert not code.ran


@pytest.mark.parametrize("way", ["flag", "keyword"])
def test_a_name_that_is_typed_or_passed_runs(code: Code, way: str) -> None:
    if way == "flag":
        compose(Request("austen", {"model.arch": named(code)}).layers())
    else:
        from_leaf_names(arch=named(code))
    assert code.ran


def test_names_inside_typed_lists(tmp_path: Path, new_process: Callable[[], None]) -> None:
    """What --callbacks and its like give: a list, TOML text of one, or names with commas."""
    for number, write in enumerate((lambda a, b: [a, {"x": b}], lambda a, b: f'["{a}", "{b}"]', lambda a, b: f"{a},{b}")):
        first, second = (Code(tmp_path / f"{letter}{number}.py", "class C: pass\n") for letter in "ab")
        trusted_code.allow_names({"callbacks": write(named(first, "C"), named(second, "C"))})
        for one in (first, second):
            assert trusted_code.load(named(one, "C"), "callback").__name__ == "C" and one.ran
    trusted_code.allow_names(["no/such.py:C", "C:\\no", "a: b", 5, None])  # nothing there is nobody's error here


def test_modules_need_trust_as_files_do(tmp_path: Path, new_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package").mkdir()
    around = Code(tmp_path / "package" / "__init__.py", "")
    inside = Code(tmp_path / "package" / "evil.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("package.evil:Mine", "os:system", "sys:exit", "no.such.module:Thing"):
        with pytest.raises(ConfigError):
            MODELS.get(name)
    assert not around.ran and not inside.ran and "package" not in sys.modules
    trusted_code.allow("package.evil")
    assert MODELS.get("package.evil:Mine").arch == "mine"
    for name in ("package", "package.evil"):
        monkeypatch.delitem(sys.modules, name)


def test_treadles_own_places_need_no_trust(new_process: Callable[[], None]) -> None:
    assert MODELS.get("treadle.models.transformer:Transformer").arch == "transformer"


# ---- what a run remembers ----


def test_a_users_own_run_goes_on_without_asking(code: Code, tmp_path: Path, new_process: Callable[[], None]) -> None:
    folder = started(code, tmp_path / "run")
    mode = (tmp_path / "home" / "trusted_code").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600 and stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700
    new_process()
    for target in (folder, folder / "config.toml", tmp_path / "story.txt"):
        request = Request(str(target))
        assert configure(request, folder).arch == named(code)
        new_process()
    code.mark.unlink()
    code.write(MODEL + "# another version\n")
    with pytest.raises(ConfigError, match=r"changed since you trusted it.*--trust-code"):
        configure(Request(str(folder)), folder)
    assert not code.ran
    configure(Request(str(folder), trust_code=[str(code.path)]), folder)
    assert code.ran


def test_a_run_cannot_vouch_for_itself(code: Code, tmp_path: Path, new_process: Callable[[], None]) -> None:
    """Whoever makes a hostile run can write the right sha256 into it."""
    folder = started(code, tmp_path / "run")
    (tmp_path / "home" / "trusted_code").unlink()  # as on the machine of somebody else
    new_process()
    code.mark.unlink()
    with pytest.raises(ConfigError, match="--trust-code"):
        configure(Request(str(folder)), folder)
    assert not code.ran


def test_trust_is_in_the_run_as_well_as_in_the_list(code: Code, tmp_path: Path, new_process: Callable[[], None]) -> None:
    """What a user trusted once is not trusted in every file that names it later."""
    started(code, tmp_path / "run")
    new_process()
    (tmp_path / "recipe.toml").write_text(f'[model]\narch = "{named(code)}"\n')
    with pytest.raises(ConfigError, match="--trust-code") as refused:
        compose(Request(str(tmp_path / "recipe.toml")).layers())
    assert "has changed" not in str(refused.value)


def test_another_file_behind_the_same_name(code: Code, tmp_path: Path, new_process: Callable[[], None]) -> None:
    folder = started(code, tmp_path / "run")
    other = Code(tmp_path / "other.py")
    new_process()
    code.path.unlink()
    code.path.symlink_to(other.path)
    with pytest.raises(ConfigError, match=rf"--trust-code {code.path}|--trust-code {other.path}"):
        configure(Request(str(folder)), folder)
    assert not other.ran


def test_a_list_that_others_can_write_is_not_used(code: Code, tmp_path: Path, new_process: Callable[[], None]) -> None:
    folder = started(code, tmp_path / "run")
    store = tmp_path / "home" / "trusted_code"
    real = tmp_path / "real"
    for spoil in (lambda: store.chmod(0o666), lambda: (store.rename(real), real.chmod(0o600), store.symlink_to(real))):
        spoil()
        new_process()
        with pytest.raises(ConfigError, match="trusted_code is not used"):
            configure(Request(str(folder)), folder)


def test_damaged_lists_are_survived(code: Code, tmp_path: Path, new_process: Callable[[], None]) -> None:
    folder = started(code, tmp_path / "run")
    store = tmp_path / "home" / "trusted_code"
    store.write_bytes(b"\xff\xfe\n" + b"0" * 64 + b' ["x"]\nshort\n' + b"z" * 64 + b' "/a"\n' + store.read_bytes() + b"abc")
    new_process()
    assert configure(Request(str(folder)), folder).arch == named(code)


@pytest.mark.parametrize("record", ["[1]", '"x"', "{a = 1}", '{"/x.py" = "short"}'])
def test_records_of_the_wrong_kind(record: str, new_process: Callable[[], None]) -> None:
    import tomllib

    trusted_code.recall(tomllib.loads(f"[run]\ntrusted_code = {record}\n"))
    trusted_code.recall({"run": 5})
    assert trusted_code.share() == frozenset()


def test_a_run_names_its_file_as_typed_and_finds_it_from_elsewhere(
    code: Code, tmp_path: Path, new_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(code.path.parent)
    recipe = configure(Request("austen", {"model.arch": "evil.py:Mine"}), tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "run" / "config.toml").write_text(recipe.to_toml())
    new_process()
    (tmp_path / "here").mkdir()
    hostile = Code(tmp_path / "here" / "evil.py")
    monkeypatch.chdir(tmp_path / "here")  # a file of that name lies here too
    assert configure(Request(str(tmp_path / "run")), tmp_path / "run").arch == "evil.py:Mine"
    assert code.ran and not hostile.ran


def test_editing_a_file_does_not_stop_a_run(code: Code) -> None:
    trusted_code.allow(code.path)
    with trusted_code.as_loaded():
        before = MODELS.get(named(code))
        code.write("broken(")
        assert MODELS.get(named(code)) is before
    with pytest.raises(ConfigError, match="changed"):
        MODELS.get(named(code))


def test_other_processes_are_told(code: Code, new_process: Callable[[], None]) -> None:
    trusted_code.allow(code.path)
    shared = trusted_code.share()
    new_process()
    with pytest.raises(ConfigError):
        MODELS.get(named(code))
    trusted_code.adopt(shared)
    assert MODELS.get(named(code)).arch == "mine"


# ---- how it runs ----


def test_what_was_hashed_is_what_runs(code: Code, tmp_path: Path) -> None:
    """A .pyc beside the file, as valid as Python wants it, has no say."""
    about = code.path.stat()
    evil = Code(tmp_path / "cached.py", "Mine = 5\n")
    evil.path.write_bytes(evil.path.read_bytes().ljust(about.st_size, b"#"))
    os.utime(evil.path, (about.st_mtime, about.st_mtime))
    cached = Path(importlib.util.cache_from_source(str(code.path)))
    py_compile.compile(str(evil.path), cfile=str(cached), dfile=str(code.path))
    trusted_code.allow(code.path)
    assert MODELS.get(named(code)).arch == "mine" and code.ran and not evil.ran


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("class Mine: pass\n", "the class .*Mine; wanted is a class derived from treadle.models.base.Model"),
        ("def Mine(): pass\n", "a function; wanted is a class derived from treadle.models.base.Model"),
        ("Mine = 5\n", "a int; wanted is a class"),
        ("class Other: pass\n", "has no Mine"),
        ("from treadle.models.base import Model\nclass Mine(Model): pass\n", "lacks .*Config, which"),
        ("x = 1\n1 / 0\n", "line 4: ZeroDivisionError: division by zero"),
        ("def Mine(:\n", "line 3: SyntaxError"),
        ("import sys\nsys.exit(0)\n", "SystemExit"),
        ("import no_such_module_here\n", "No module named"),
    ],
)  # fmt: skip
def test_a_class_of_the_wrong_kind(code: Code, text: str, says: str) -> None:
    code.write(text)
    trusted_code.allow(code.path)
    with pytest.raises(ConfigError, match=says):
        MODELS.get(named(code))


@pytest.mark.parametrize("registry", [SINKS, TOKENIZERS])
def test_every_kind_says_what_it_wants(code: Code, registry: object) -> None:
    trusted_code.allow(code.path)
    with pytest.raises(ConfigError, match=r"wanted is a class derived from treadle\.(monitor\.sinks\.Sink|text\.base\.Tokenizer)"):
        registry.get(named(code))  # type: ignore[attr-defined]


@pytest.mark.parametrize("what", ["no/such.py", "folder.py", "no_such_module", "x/y", "", "a\0.py"])
def test_trusting_what_is_not_there(what: str, tmp_path: Path, new_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.py").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        trusted_code.allow(what)
