"""What is packaged is what the code opens, and what is declared is what it imports. Nothing is built here (test_wheel.py does)."""

from __future__ import annotations

import ast
import functools
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import treadle

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "treadle"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_OF_THE_CODE = {"dev", "bench", "all", "docs"}  # extras that no feature asks for
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
BUILD = PROJECT["tool"]["hatch"]["build"]["targets"]


@functools.cache
def trees() -> dict[Path, ast.Module]:
    """Every file of the package, parsed once."""
    return {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def tracked(*paths: str) -> list[str]:
    out = subprocess.run(["git", "ls-files", "-z", "--", *paths], cwd=ROOT, capture_output=True, text=True)
    if out.returncode:
        pytest.skip("not a git checkout: what it tracks is not known")
    return [name for name in out.stdout.split("\0") if name]


def test_one_version() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"]
    path = PROJECT["tool"]["hatch"]["version"]["path"]
    assert re.findall(r'__version__ = "(.*)"', (ROOT / path).read_text()) == [treadle.__version__]
    others = [p for p in PACKAGE.rglob("*.py") if re.search(r'__version__ = "', p.read_text()) and str(p.relative_to(ROOT)) != path]
    assert others == []


def test_the_changelog_has_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    heads = re.findall(r"^## \[(.*?)\]", text, flags=re.M)
    assert heads[:2] == ["Unreleased", treadle.__version__]
    assert set(re.findall(r"^### (.*)", text, flags=re.M)) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Known limits"}
    for link in re.findall(r"\]\(((?!http)[^)]*)\)", text):
        assert (ROOT / link).is_file(), link


def test_every_folder_beside_the_package_that_code_opens_is_shipped() -> None:
    """`shipped("recipes")` (or `package.parent / "recipes"`) in a checkout is `treadle/recipes` in a wheel."""
    opened = r'(?:package\.parent / |shipped\()"(\w+)"'
    beside = {name for p in PACKAGE.rglob("*.py") for name in re.findall(opened, p.read_text(), flags=re.I)}
    assert beside >= {"recipes", "suites"}
    assert BUILD["wheel"]["force-include"] == {name: f"treadle/{name}" for name in sorted(beside)}
    assert beside <= set(BUILD["sdist"]["only-include"])


def test_what_the_source_distribution_names_is_there() -> None:
    names = BUILD["sdist"]["only-include"]
    assert [name for name in names if not tracked(name)] == []
    wanted = {"treadle", PROJECT["project"]["readme"], *BUILD["wheel"]["force-include"]} | {f for f in PROJECT["project"]["license-files"] if "/" not in f}
    assert wanted <= set(names)


def test_every_file_of_the_package_is_tracked_and_opened() -> None:
    """A file that is no Python is read by some code: by its name, or by its suffix out of its folder."""
    source = "\n".join(p.read_text() for p in PACKAGE.rglob("*.py"))
    files = [Path(name) for name in tracked("treadle") if not name.endswith(".py")]
    assert files
    for path in files:
        if path.name in ("py.typed", "LICENCE.md"):  # for type checkers, for people
            continue
        by_name = f'"{path.name}"' in source or f'("{path.stem}")' in source or f'"{path.stem}"' in source
        by_suffix = re.search(rf"\.glob\(\"\*\{path.suffix}\"\)|\{{name\}}\{path.suffix}\"|\.\{{name\}}\"", source)
        assert by_name or by_suffix, f"{path} is opened by no code"


def test_no_ignored_file_is_needed() -> None:
    """hatch leaves out what .gitignore names."""
    for name in tracked("treadle", "recipes", "suites"):
        assert subprocess.run(["git", "check-ignore", "-q", "--no-index", name], cwd=ROOT).returncode == 1, name


# ---- what is imported

DISTRIBUTIONS = {"yaml": "pyyaml", "lm_eval": "lm-eval", "indexed_gzip": "indexed-gzip"}
# Come with another package, which is declared; or (fla) are looked for, named in the documents, and never asked for.
WITH = {"triton": "torch", "llvmlite": "numba", "huggingface_hub": "transformers", "tqdm": "lm-eval", "fla": None}


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower()  # type: ignore[index]


@functools.cache
def third_party() -> dict[str, set[str]]:
    """Top module -> the files of treadle that import it, anywhere in them."""
    found: dict[str, set[str]] = {}
    for path, tree in trees().items():
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.partition(".")[0]
                if top not in sys.stdlib_module_names and top not in ("treadle", ""):
                    found.setdefault(top, set()).add(str(path.relative_to(ROOT)))
    return found


def test_every_import_is_declared() -> None:
    core = {name_of(r) for r in PROJECT["project"]["dependencies"]}
    optional = {name_of(r) for extra, rs in EXTRAS.items() if extra not in NOT_OF_THE_CODE for r in rs}
    for module, files in third_party().items():
        wanted = WITH.get(module, DISTRIBUTIONS.get(module, module))
        assert wanted is None or wanted in core | optional, f"{module}, imported by {sorted(files)}, is neither a dependency nor in an extra"


def test_every_dependency_is_used() -> None:
    """A core dependency that nothing imports is a download for nothing."""
    modules = {DISTRIBUTIONS.get(module, module) for module in third_party()}
    used_otherwise = {"tensorboard"}  # through torch.utils.tensorboard
    assert {name_of(r) for r in PROJECT["project"]["dependencies"]} - modules - used_otherwise == set()


def test_extras_in_errors_exist() -> None:
    named = set()
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("MissingExtra"):
                extra = node.args[1]
                assert isinstance(extra, ast.Constant), f"{path}: write the extra's name out"
                named.add(str(extra.value))
    assert named == EXTRAS.keys() - NOT_OF_THE_CODE, "an extra that no error names, or an error that names none"


def test_documents_name_extras_that_exist() -> None:
    for path in [ROOT / "README.md", ROOT / "Containerfile", *(ROOT / "docs").glob("*.md"), *PACKAGE.rglob("*.py")]:
        for names in re.findall(r"(?:treadle|\.|source)\[([a-z,]+)\]['\"]", path.read_text()):
            assert set(names.split(",")) <= EXTRAS.keys(), f"{path.name}: [{names}]"


# ---- the container file


def instructions() -> list[tuple[str, list[str]]]:
    """(INSTRUCTION, words) of the container file, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Containerfile").read_text(), flags=re.M)
    lines = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], shlex.split(line.split(maxsplit=1)[1])) for line in lines]


def test_the_container_file_copies_what_a_build_needs() -> None:
    found = instructions()
    known = {"ARG", "FROM", "RUN", "USER", "ENV", "COPY", "WORKDIR", "VOLUME", "EXPOSE", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in found} <= known and [word for word, _ in found][:2] == ["ARG", "FROM"]
    copies = [[w for w in words if not w.startswith("--")] for word, words in found if word == "COPY"]
    sources = {source for *sources, _ in copies for source in sources}
    assert [source for source in sources if not tracked(source)] == []
    needed = {"pyproject.toml", "treadle", PROJECT["project"]["readme"], *BUILD["wheel"]["force-include"]}
    assert needed | {f for f in PROJECT["project"]["license-files"] if "/" not in f} == sources
    for *names, target in copies:  # a folder's own name has to be said again, or its contents land in the parent
        assert target.endswith("/source/") if len(names) > 1 else target.endswith(f"/source/{names[0]}")


def test_the_container_runs_as_nobody_special_and_keeps_runs_and_cache() -> None:
    found = instructions()
    users = [i for i, (word, words) in enumerate(found) if word == "USER" and words[0] not in ("root", "0")]
    pips = [i for i, (word, words) in enumerate(found) if word == "RUN" and "pip" in words]
    assert len(users) == 1 and all(users[0] < i for i in pips) and "USER" not in [word for word, _ in found[users[0] + 1 :]]
    text = (ROOT / "Containerfile").read_text()
    volumes = re.findall(r'"(/\w+)"', text[text.index("VOLUME") :].splitlines()[0])
    assert volumes == ["/runs", "/cache"] and "WORKDIR /runs" in text
    environment = dict(word.split("=", 1) for name, words in found if name == "ENV" for word in words)
    assert environment["TREADLE_CACHE"].startswith("/cache/") and environment["HF_HOME"].startswith("/cache/")
    assert 'ENTRYPOINT ["treadle"]' in text
