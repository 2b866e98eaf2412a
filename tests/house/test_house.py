"""Rules that hold over the whole tree: imports go down, nothing unsafe, no key unread, no room without its files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import treadle
from treadle.models.catalogue import MODELS
from treadle.settings import Settings
from treadle.training.config import SECTIONS

PACKAGE = Path(treadle.__file__).parent
# From the top of the house to the bottom; a room imports only rooms further down.
ROOMS = [
    "__init__", "__main__", "cli", "cli_collatz", "cli_collatz_search", "cli_projects", "cli_serving", "cli_text", "cli_options", "completion", "library", "help", "examine", "suite", "sweep", "convert", "distillation", "dry_run", "start", "recipe", "task_file", "live", "reporting", "planning", "collatz_tasks", "training",
    "evaluation", "objectives", "monitor", "distributed", "serving", "models", "generation", "data", "layers", "text", "checkpoint",
    "ops", "collatz", "recommended", "naming", "foreign", "settings", "registry", "trusted_code", "terminal", "processes", "ray_cluster", "storage", "files", "errors", "version",
]  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports_of(tree: ast.AST) -> list[str]:
    """treadle modules that a file imports, anywhere in it, except under TYPE_CHECKING."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("treadle"):
            found += [node.module or ""] if node.module != "treadle" else [f"treadle.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.startswith("treadle")]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_go_down(path: Path) -> None:
    # models/catalogue.py and the settings.py files hold names and keys, no room's work: anyone above may read them.
    here = ROOMS.index(room_of(path))
    for module in imports_of(ast.parse(path.read_text())):
        room = module.split(".")[1] if "." in module else "__init__"
        assert room in ROOMS, f"{module} is in no room of the house"
        assert ROOMS.index(room) >= here, f"{path.name} ({room_of(path)}) imports {module}, which is above it"


def file_graph(files: list[Path]) -> dict[Path, set[Path]]:
    """File -> the files among these that it imports: at its top, inside functions and under TYPE_CHECKING."""
    by_name = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in files}
    graph: dict[Path, set[Path]] = {}
    for path in files:
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: write treadle.x instead of a relative import"
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in by_name else node.module or "" for name in whole}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        graph[path] = {by_name[name] for name in names if name in by_name} - {path}
    return graph


def circle(files: list[Path]) -> list[str]:
    """Files that import each other in a circle, first and last the same; nothing where there is none."""
    try:
        TopologicalSorter(file_graph(files)).prepare()
    except CycleError as error:
        return [str(path.relative_to(PACKAGE)) for path in error.args[1]]
    return []


def test_no_file_imports_in_a_circle() -> None:
    assert circle(FILES) == []


TRAINING = [path for path in FILES if room_of(path) == "training" and path.name != "__init__.py"]


@pytest.mark.parametrize("path", TRAINING, ids=lambda p: str(p.relative_to(PACKAGE / "training")))
def test_a_file_of_training_says_what_it_changes_and_knows_no_trainer(path: Path) -> None:
    first, text = path.read_text().splitlines()[0], path.read_text()
    assert re.search(r"\bchanges?\b", first, flags=re.I), f"{path.name} begins {first!r}: say what it may change"
    assert path.name == "trainer.py" or not re.search(r"\bTrainer\b|training\.trainer", text), f"{path.name} knows the Trainer"


def test_the_trainer_stays_small_and_its_loop_one_screen() -> None:
    text = (PACKAGE / "training" / "trainer.py").read_text()
    assert text.count("\n") <= 260
    loop = text[text.index("def _train") : text.index("# ---- what the loop carries out")]
    assert loop.count("\n") <= 70


FORBIDDEN_CALLS = {"torch.load", "torch.save", "eval", "exec", "yaml.load", "pickle.load", "pickle.loads"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_unsafe(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
            assert not {"pickle", "dill", "cloudpickle", "shelve", "marshal"} & set(names)
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, ast.unparse(node)
            for keyword in node.keywords:
                allowed = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is True)
                assert allowed or keyword.arg not in ("allow_pickle", "trust_remote_code", "shell"), ast.unparse(node)


def test_no_architecture_is_named_outside_models() -> None:
    """The trainer and its neighbours know no model's name."""
    for path in FILES:
        if room_of(path) in ("training", "evaluation", "generation", "data", "objectives", "monitor", "checkpoint"):
            words = re.findall(r'"(transformer|shc|ssm|hgrn_bit|hnet|inl)"', path.read_text())
            assert (path.name == "config.py" and words == ["transformer"]) or not words, f"{path} names {words}"


def _attributes(files: list[Path]) -> set[str]:
    return {n.attr for p in files for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.Attribute)}


def test_every_configuration_key_is_read() -> None:
    """A key that no code outside its own section reads is a promise nobody keeps."""
    elsewhere = _attributes([p for p in FILES if p.name != "settings.py"])
    # Keys of [data] that arrive as keyword arguments or through the section object itself.
    for section, cls in SECTIONS.items():
        for key in cls.model_fields:
            assert key in elsewhere, f"{section}.{key} is read by no code"


@pytest.mark.parametrize("name", MODELS.names())
def test_every_model_key_is_read(name: str) -> None:
    cls = MODELS.get(name)
    homes = {base.__module__ for base in (*cls.__mro__, *cls.Config.__mro__)}  # what it inherits reads keys too
    files = [Path(sys.modules[home].__file__ or "") for home in homes if home.startswith("treadle.models.")]
    if "layer_types" in cls.Config.model_fields:
        files += [path for path in FILES if room_of(path) == "layers" and "def from_config(" in path.read_text()]
        files += list((PACKAGE / "models" / "huggingface").glob("*.py"))  # the family that an export writes
    read = _attributes(files)
    for key in cls.Config.model_fields:
        assert key in read, f"model.{key} of {name} is read by no code"


@pytest.mark.parametrize(
    "cls", [*SECTIONS.values(), *(MODELS.get(n).Config for n in MODELS.names())], ids=lambda c: c.__name__
)
def test_every_key_has_help(cls: type[Settings]) -> None:
    for key in cls.model_fields:
        assert len(cls.meaning(key)) > 10, f"{cls.__name__}.{key} has no documentation"


def test_no_key_shares_a_section_name() -> None:
    for cls in SECTIONS.values():
        assert not set(cls.model_fields) & {*SECTIONS, "model"}


def test_leaf_names_are_unambiguous() -> None:
    """Every key works without its section, except a model's own vocab_size beside the tokenizer's."""
    seen: dict[str, str] = {}
    for section, cls in SECTIONS.items():
        for key in cls.model_fields:
            if key in ("name",):  # tokenizer.name and optim.name: an error that names both
                continue
            assert key not in seen, f"{key} is in [{seen.get(key)}] and [{section}]"
            seen[key] = section


def test_files_stay_readable() -> None:
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 520, f"{path} answers more than one question"


@pytest.mark.parametrize(
    "line", [["--help"], ["recipes"], ["data", "stats", "{text}"], ["tokenizer", "show", "byte"], ["data", "--help"]]
)
def test_light_verbs_import_no_torch(line: list[str], text_file: Path, own_cache: Path) -> None:
    program = (
        "import sys\nfrom treadle.cli import main\nsys.argv = ['treadle'] + sys.argv[1:]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    line = [part.format(text=text_file) for part in line]
    out = subprocess.run([sys.executable, "-c", program, *line], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def test_importing_treadle_is_free() -> None:
    code = "import sys, treadle; assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    for name in treadle.__all__:
        assert getattr(treadle, name) is not None
