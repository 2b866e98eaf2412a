"""Code that is not treadle's: which of it may run, and running it.

A name like FILE.py:CLASS or MODULE:CLASS makes treadle execute a file. Who types such a name, or passes it from Python, means
that. A name that was read from a recipe, a run, a model folder or a tokenizer folder was written by whoever made that file, so
it runs nothing unless the user has said so: `--trust-code FILE.py`.

Trust is a path together with the sha256 of what lies there. What a run used is written into its config.toml, so that the run
goes on without asking; since anybody can write that, it counts only for what the same user's own list remembers (`store_path`,
a 0600 file outside of every run). The bytes that were hashed are the bytes that run: no second look at the disk, no .pyc.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.abc
import importlib.util
import json
import os
import re
import shlex
import stat
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from treadle import terminal
from treadle.errors import ConfigError

STORE_FOLDER = "TREADLE_CONFIG_HOME"  # an environment variable: where the list lies instead of the user's own place
STORE_FILE = "trusted_code"
MODULE_PREFIX = "treadle_user_"  # of the modules that files are executed as
_PLACE = re.compile(r"(.+\.py|[A-Za-z_][\w.]*):([A-Za-z_]\w*)")
_MODULE = re.compile(r"[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class Source:
    """One file of code as it is now. A module without a file (built into Python) has its name in brackets and no digest."""

    path: str
    sha256: str
    data: bytes = field(default=b"", repr=False, compare=False)

    @property
    def key(self) -> tuple[str, str]:
        """(path, digest): what trust is given to."""
        return self.path, self.sha256


_allowed: set[tuple[str, str]] = set()  # (path, sha256) that this process may execute
_kept: set[tuple[str, str]] = set()  # those of them that are in the user's list, or could not be written there
_loaded: dict[str, str] = {}  # path -> sha256 of what this process has executed last
_modules: dict[tuple[str, str], ModuleType] = {}
_places: dict[int, str] = {}  # id of a loaded thing (modules keep it alive) -> the name it can be loaded by from anywhere
_frozen: dict[str, str] | None = None


def is_place(name: str) -> bool:
    """FILE.py:NAME or MODULE:NAME."""
    return _PLACE.fullmatch(name) is not None


# ---- saying what is trusted ----


def allow(what: str | Path | Iterable[str | Path]) -> None:
    """The user trusts this FILE.py or MODULE (or these) as it is now. ConfigError when there is no such thing."""
    if not isinstance(what, (str, Path)):
        for one in what:
            allow(one)
        return
    where = str(what)
    found = _PLACE.fullmatch(where)
    where = found[1] if found else where
    if not where.endswith(".py") and not _MODULE.fullmatch(where):
        raise ConfigError(f"--trust-code {where}: give a .py file, or the name of a module")
    _allowed.update(source.key for source in _sources(where, typed=True))


def allow_names(value: Any) -> None:
    """Trusts every name of code in what a user typed or passed from Python: text, or lists and tables of it. A name that
    leads nowhere is left to whoever uses it."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        for item in value:
            allow_names(item)
    elif isinstance(value, str) and ":" in value:
        for name in {value.strip(), *(part.strip(" \"'") for part in value.strip("[] ").split(","))}:
            if is_place(name):
                try:
                    allow(name)
                except ConfigError:
                    continue


def recall(config: dict[str, Any]) -> None:
    """What a run's configuration says it has used (run.trusted_code) counts where this user's own list says the same."""
    run = config.get("run")
    record = run.get("trusted_code") if isinstance(run, dict) else None
    if isinstance(record, dict) and record:
        known, _ = _read_store()
        _allowed.update(known & {(path, digest) for path, digest in record.items() if isinstance(digest, str)})


def record(names: Any = ()) -> dict[str, str]:
    """path -> sha256 of the code that this process has run and of trusted code that is named somewhere in `names`: what a run
    writes down about itself."""
    found = {path: digest for path, digest in _loaded.items() if digest}
    for source in (source for sources in _trusted_in(names).values() for source in sources):
        found.setdefault(source.path, source.sha256)
    return dict(sorted(found.items()))


def contents(names: Any) -> dict[str, list[str]]:
    """Name -> sha256 of each file behind it, for the names of trusted code somewhere in `names`: what tells a result of such code from
    one of the same file before it was edited. Files that this code imports in turn are not looked into."""
    return {name: [source.sha256 for source in sources] for name, sources in _trusted_in(names).items()}


def _trusted_in(names: Any) -> dict[str, list[Source]]:
    """Name -> the trusted files behind it, for every name somewhere in `names` that has any."""
    found = {}
    for name in sorted(set(_names_in(names))):
        try:
            sources = _sources(_PLACE.fullmatch(name)[1])  # type: ignore[index]
        except ConfigError:
            continue
        if trusted := [source for source in sources if source.key in _allowed and source.sha256]:
            found[name] = trusted
    return found


def _names_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _names_in(item)
    elif isinstance(value, str) and is_place(value):
        yield value


def share() -> frozenset[tuple[str, str]]:
    """What a process started by this one is given (`adopt`)."""
    return frozenset(_allowed)


def adopt(shared: Iterable[tuple[str, str]]) -> None:
    """Takes over what another process was told to trust."""
    _allowed.update(shared)
    _kept.update(shared)  # the process that was told keeps it


@contextmanager
def as_loaded() -> Iterator[None]:
    """Inside, a file that was executed inside stays what it was: editing it while a run trains does not stop that run."""
    global _frozen
    if _frozen is not None:
        yield
        return
    _frozen = {}
    try:
        yield
    finally:
        _frozen = None


# ---- running it ----


def require(name: str, kind: str) -> list[Source]:
    """The files behind a name, all trusted. ConfigError, with the flag that allows it, for one that is not."""
    found = _PLACE.fullmatch(name)
    assert found is not None
    sources = _sources(found[1])
    refused = [source for source in sources if source.key not in _allowed]
    if refused:
        raise ConfigError(_refusal(name, kind, refused[-1], found[1]))
    for source in sources:
        _keep(source)
    return sources


def load(name: str, kind: str) -> Any:
    """What FILE.py:NAME or MODULE:NAME names. ConfigError for code that is not trusted, does not run, or has no such name."""
    sources = require(name, kind)
    where, _, attribute = name.rpartition(":")
    if where.endswith(".py"):
        module, place = _executed(sources[0], name), f"{sources[0].path}:{attribute}"
    else:
        module, place = _running(lambda: importlib.import_module(where), name, sources[-1].path), name
    _note(sources)
    thing = getattr(module, attribute, None)
    if thing is None:
        raise ConfigError(f"{where} has no {attribute}")
    if getattr(thing, "__module__", None) == module.__name__:
        _places[id(thing)] = place
    return thing


def _note(sources: list[Source]) -> None:
    """These were executed."""
    for source in sources:
        _loaded[source.path] = source.sha256
        if _frozen is not None:
            _frozen[source.path] = source.sha256


def load_file(path: Path, kind: str) -> ModuleType:
    """A whole trusted file as a module; its classes can be loaded by FILE.py:CLASS afterwards."""
    sources = require(f"{path}:{kind}", kind)
    module = _executed(sources[0], str(path))
    _note(sources)
    for attribute, thing in vars(module).items():
        if getattr(thing, "__module__", None) == module.__name__:
            _places[id(thing)] = f"{sources[0].path}:{attribute}"
    return module


def place_of(thing: Any) -> str | None:
    """The FILE.py:NAME (absolute) or MODULE:NAME that `load` gave this for; None for what is treadle's or registered."""
    return _places.get(id(thing))


class _Bytes(importlib.abc.InspectLoader):
    """Executes bytes that were read before; importlib's own loader would read the file again, or a .pyc in its place."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def is_package(self, fullname: str) -> bool:
        return False

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self.source.data)

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.source.data, self.source.path)


def _executed(source: Source, name: str) -> ModuleType:
    if source.key not in _modules:
        mark = hashlib.sha256(f"{source.path}\n{source.sha256}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
        unique = f"{MODULE_PREFIX}{Path(source.path).stem}_{mark}"
        spec = importlib.util.spec_from_file_location(unique, source.path, loader=_Bytes(source))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[unique] = module
        loader = spec.loader
        try:
            _running(lambda: loader.exec_module(module), name, source.path)
        except BaseException:
            del sys.modules[unique]
            raise
        _modules[source.key] = module
    return _modules[source.key]


def _running(work: Callable[[], Any], name: str, path: str) -> Any:
    """work(); what the user's code raises meanwhile becomes a ConfigError that names the file and the line."""
    try:
        return work()
    except (Exception, SystemExit) as problem:
        lines = [frame.lineno for frame in traceback.extract_tb(problem.__traceback__) if frame.filename == path]
        if isinstance(problem, SyntaxError) and problem.filename == path:
            lines, said = [problem.lineno], problem.msg
        else:
            said = str(problem)
        at = f", line {lines[-1]}" if lines else ""
        raise ConfigError(f"{path}{at}: {type(problem).__name__}: {said} (while {name} was loaded)") from problem


# ---- what lies behind a name ----


def _sources(where: str, typed: bool = False) -> list[Source]:
    """Every file that runs when `where` is loaded: the file, or a module's and those of the packages around it. typed: the name is
    what somebody gives here and now, so that a file of this folder comes before one that a run has recorded."""
    return [_source_of_file(where, typed)] if where.endswith(".py") else _sources_of_module(where)


def _source_of_file(where: str, typed: bool) -> Source:
    here = _real(where)
    if _frozen is not None and here in _frozen:
        return _source_as_loaded(here)
    if not os.path.isabs(where):
        # A run names the file as it was typed; from another folder it is the one that the run has recorded.
        found = _read(here) if os.path.isfile(here) else None
        if found is not None and (typed or found.key in _allowed):
            return found
        tail = Path(where).parts
        for path in sorted({path for path, _ in _allowed if Path(path).parts[-len(tail) :] == tail and path != here}):
            if _frozen is not None and path in _frozen:
                return _source_as_loaded(path)
            if os.path.isfile(path) and (other := _read(path)).key in _allowed:
                return other
    if not os.path.exists(here):
        raise ConfigError(f"{where} does not exist, so nothing can be loaded from it")
    return _read(here)


def _source_as_loaded(path: str) -> Source:
    assert _frozen is not None
    return Source(path, _frozen[path])


def _real(where: str) -> str:
    try:
        return os.path.realpath(where)
    except ValueError as problem:  # a NUL in it
        raise ConfigError(f"{where!r} is no path: {problem}") from None


def _read(path: str) -> Source:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise ConfigError(f"{path} is no file, so no code can be loaded from it")
            data = stream.read()
    except (OSError, ValueError) as problem:
        raise ConfigError(f"{path} cannot be read: {problem}") from None
    return Source(path, hashlib.sha256(data).hexdigest(), data)


def _sources_of_module(name: str) -> list[Source]:
    parts = name.split(".")
    found: list[Source] = []
    inside: Any = None
    for number in range(1, len(parts) + 1):
        one = ".".join(parts[:number])
        try:  # finding a module by a dotted name would import the packages around it; this does not
            spec = importlib.util.find_spec(one) if number == 1 else PathFinder.find_spec(one, inside)
        except (ImportError, ValueError, AttributeError):
            spec = None
        if spec is None and (number > 1 or one not in sys.modules):
            raise ConfigError(f"there is no module {one}; give its file instead, as in FILE.py:CLASS")
        origin = spec.origin if spec is not None else None
        if origin is not None and os.path.isabs(origin):
            path = _real(origin)
            found.append(_source_as_loaded(path) if _frozen is not None and path in _frozen else _read(path))
        else:
            found.append(Source(f"<{one}>", ""))
        inside = list(spec.submodule_search_locations or []) if spec is not None else []
    return found


def _refusal(name: str, kind: str, source: Source, where: str) -> str:
    """Why a name from a file is not honoured, and what to type."""
    known, note = _read_store()
    trusted = {digest for path, digest in known | _allowed if path == source.path}
    changed = bool(trusted) and source.sha256 not in trusted  # what another run trusts, as it is, is not trusted here
    code = source.path if source.sha256 else f"the module {source.path[1:-1]}"
    what = f"{code}, which has changed since you trusted it" if changed else code
    flag = source.path if where.endswith(".py") else where
    return (f"{kind} {name!r} was read from a file, and would run {what}. No file runs code by itself: look at it and, if you "
            f"trust it, add --trust-code {shlex.quote(flag)} (from Python: trust_code=[{flag!r}]){note}")  # fmt: skip


# ---- the user's own list ----


def store_path() -> Path | None:
    """Where this user's list lies. A relative path in the environment would mean a folder of somebody else's and is ignored."""
    own, shared = os.environ.get(STORE_FOLDER, ""), os.environ.get("XDG_CONFIG_HOME", "")
    if os.path.isabs(own):
        return Path(own) / STORE_FILE
    if os.path.isabs(shared):
        return Path(shared) / "treadle" / STORE_FILE
    try:
        return Path.home() / ".config" / "treadle" / STORE_FILE
    except RuntimeError:  # a user without a home
        return None


def _read_store() -> tuple[set[tuple[str, str]], str]:
    """({(path, sha256)}, why the list is not used: "" when it is)."""
    path = store_path()
    if path is None:
        return set(), ""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as stream:
            about = os.fstat(stream.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o022:
                return set(), f". {path} is not used: it has to be a file of your own that only you can write (chmod 600)"
            lines = stream.read().splitlines()
    except FileNotFoundError:
        return set(), ""
    except OSError as problem:
        return set(), f". {path} is not used: {problem.strerror}"
    found = set()
    for line in lines:
        digest, _, rest = line.partition(b" ")
        try:
            trusted = json.loads(rest)
        except ValueError:
            continue
        if isinstance(trusted, str) and re.fullmatch(rb"[0-9a-f]{64}", digest):
            found.add((trusted, digest.decode()))
    return found, ""


def _keep(source: Source) -> None:
    """Adds a file to the user's list. Lines are only ever added, in one write each, so that processes do not disturb one
    another; a list that cannot be written means to be asked again."""
    if source.key in _kept or not source.sha256:
        return
    _kept.add(source.key)
    path = store_path()
    known, note = _read_store()
    if path is None or source.key in known:
        return
    try:
        if note:
            raise OSError(note.strip(". "))
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(path, flags, 0o600)
        try:
            os.write(handle, f"{source.sha256} {json.dumps(source.path)}\n".encode())
        finally:
            os.close(handle)
    except OSError as problem:
        terminal.write(f"warning: that you trust {source.path} cannot be kept ({problem}); the next command asks for "
                       "--trust-code again", sys.stderr)  # fmt: skip
