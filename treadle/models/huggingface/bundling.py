"""One file of plain torch that computes a model: what its class reaches in treadle's own source, in order, without the rest.

A second implementation would have to be kept equal by hand; this one is the first, so that its logits are ours. Definitions that are
not reached are left out, methods that nothing calls too, and so are branches behind kernels that a bundle does not carry
(`NOTHING`, `NEVER`). Names that two modules have get the module's name behind them. Equal sources give equal bytes.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from treadle.errors import ConfigError
from treadle.models.huggingface.bundled_source import (
    UNKNOWN,
    Edit,
    Meaning,
    Outside,
    Place,
    Read,
    Reader,
    Reference,
    Source,
)

OURS = "treadle"
PORTABLE = "treadle.models.huggingface.portable"
OPTION = Place("treadle.settings", "option")
# Functions that find kernels, which are not there.
NOTHING = {
    Place("treadle.ops.native", "library"), Place("treadle.ops.fused", "kernels"), Place("treadle.ops.ternary", "native"),
    Place("treadle.ops.flash_linear_attention", "flash"),
}  # fmt: skip
NEVER = {
    Place("treadle.ops.kernel_inputs", "usable"), Place("treadle.ops.planned", "runs_on_cpu"),
    Place("treadle.layers.fp8", "in_8_bits"), Place("treadle.ops.planned", "gpu_is_planned"), Place("treadle.ops.planned", "is_planned"), Place("treadle.ops.recurrent_block", "available"),
}  # fmt: skip
# What variables, parameters and attributes of a module always are.
FIXED: dict[str, dict[str, object]] = {"treadle.ops.scan": {"way": "loop"}, "treadle.ops.attention": {"_backend": "auto"}}
# What stands for definitions that need more than torch.
REPLACED = {
    Place("treadle.settings", "Settings"): Place(PORTABLE, "Settings"),
    Place("treadle.errors", "ConfigError"): Place(PORTABLE, "ConfigError"),
    Place("treadle.library", "Model"): Place("treadle.models.base", "Model"),  # the public name; what it adds loads runs
}
DROPPED_FIELDS = ("model_config", "translations", "switches", "called")  # of the keys' classes
VALIDATORS = ("model_validator", "field_validator")
TOLD_TO_TOOLS = re.compile(r"  # (?:type: ignore(?:\[[^]]*\])?|fmt: skip|noqa(?:: \w+)?)(?=\s*(?:#|$))", re.MULTILINE)


@functools.cache
def source_of(module: str) -> Source:
    """A module's source, read once in a process."""
    return Source(module)


@functools.cache
def public_names() -> dict[str, str]:
    """Name -> MODULE:NAME of what treadle/__init__.py loads on first use."""
    found = source_of(OURS).definitions["_PLACES"]
    assert isinstance(found, ast.Assign)
    return dict(ast.literal_eval(found.value))


class Bundle:
    """The text for a class (or any definition) and what it reaches.

    roots: definitions to begin with; instead: further definitions that stand for others; keeping: modules of which every method is
    kept; constants: assignments (`NAME = text`) that stand for definitions.
    """

    def __init__(
        self, roots: Iterable[Place], instead: Mapping[Place, Place] | None = None, keeping: Iterable[str] = (),
        constants: Mapping[Place, tuple[str, Iterable[Place]]] | None = None,
    ) -> None:  # fmt: skip
        self.instead = {**REPLACED, **(instead or {})}
        self.keeping, self.constants = tuple(keeping), dict(constants or {})
        self.sources: dict[str, Source] = {}
        self.answers: dict[Place, object] = {}
        self.reads: dict[Place, Read] = {}
        self.methods: dict[Place, dict[str, Read | None]] = {}  # of each class; None: not kept so far
        self.held: dict[Place, dict[str, object]] = {}  # of each class, attributes that always have one value
        self.attributes: set[str] = set()
        todo = list(roots)
        while todo:
            self._include(todo)
            todo = self._reached_methods()

    # ---- what is reached ----

    def source(self, module: str) -> Source:
        """The source of a module, read once."""
        if module not in self.sources:
            self.sources[module] = source_of(module)
        return self.sources[module]

    def meaning(self, module: str, name: str) -> Meaning:
        """What a global name of a module is. ConfigError for a name that should be one of ours and is not there."""
        place, source = Place(module, name), self.source(module)
        if place in self.instead:
            return self.instead[place]
        if name in source.definitions or place in self.constants:
            return place
        found = source.imports.get(name)
        if found is None or found.module == "__future__":
            return None
        if not self._is_ours(found.module):
            return found
        if found.name is None:
            self.source(found.module)
            return found.module
        return self.inside(found.module, found.name, source)

    def inside(self, module: str, name: str, asking: Source) -> Meaning:
        """What `name` of a module of ours is: a public name, a definition, or a module in it. ConfigError where it is nothing."""
        if module == OURS and name in public_names():
            where, _, defined = public_names()[name].partition(":")
            return self.meaning(where, defined)
        if name not in self.source(module).definitions and _is_module(inside := f"{module}.{name}"):
            self.source(inside)
            return inside
        meaning = self.meaning(module, name)
        if meaning is None:
            raise ConfigError(f"{asking.path}: {module} has no {name} to bundle")
        return meaning

    def _is_ours(self, module: str) -> bool:
        return module == OURS or module.startswith(f"{OURS}.")

    def constant(self, place: Place) -> object:
        """The answer of a function that always gives the same; UNKNOWN for any other."""
        if place in NOTHING or place in NEVER:
            return None if place in NOTHING else False
        if place not in self.answers:
            self.answers[place] = UNKNOWN  # while it is looked at, also for what calls itself
            node = self.source(place.module).definitions.get(place.name)
            if isinstance(node, ast.FunctionDef) and not node.decorator_list:
                self.answers[place] = self._reader(place.module).answer_of(node)
        return self.answers[place]

    def _reader(self, module: str) -> Reader:
        return Reader(self.source(module), self.meaning, self.inside, self.constant, OPTION, FIXED.get(module, {}))

    def _include(self, todo: list[Place]) -> None:
        while todo:
            place = todo.pop()
            if place in self.reads:
                continue
            if place in self.constants:
                self.reads[place] = Read()
                todo += self.constants[place][1]
                continue
            node = self.source(place.module).definitions.get(place.name)
            if node is None:
                raise ConfigError(f"{place.module} has no {place.name} to bundle")
            reader = self._reader(place.module)
            if isinstance(node, ast.ClassDef):
                self._read_class(place, node, reader)
            else:
                reader.block([node])
            self.reads[place] = reader.found
            todo += self._needs(reader.found)

    def _needs(self, read: Read) -> list[Place]:
        """Definitions that have to be there; those of types in annotations where they are plain assignments."""
        self.attributes |= read.attributes
        for one in read.references:
            if isinstance(one.meaning, str) and not one.annotation:
                raise ConfigError(f"{ast.unparse(one.node)} (the module {one.meaning}) is used as a value; write `from {one.meaning} import NAME`, "
                                  "so that what is used can be bundled")  # fmt: skip
        return [r.meaning for r in read.references if isinstance(r.meaning, Place) and (not r.annotation or self._is_alias(r.meaning))]

    def _is_alias(self, place: Place) -> bool:
        return isinstance(self._node(place), (ast.Assign, ast.AnnAssign))

    def _node(self, place: Place) -> ast.stmt | None:
        """The statement that a definition is; None where a constant stands for it."""
        return None if place in self.constants else self.source(place.module).definitions[place.name]

    def _read_class(self, place: Place, node: ast.ClassDef, reader: Reader) -> None:
        for expression in (*node.decorator_list, *node.bases, *(keyword.value for keyword in node.keywords)):
            reader.visit(expression)
        self.methods[place] = {}
        for one in node.body:
            if isinstance(one, ast.FunctionDef):
                self.methods[place].setdefault(one.name, None)
            elif not (_names(one) & set(DROPPED_FIELDS)):
                reader.visit(one)

    def _reached_methods(self) -> list[Place]:
        """Reads the methods that what was read so far may call; definitions that these need."""
        needed: list[Place] = []
        for place, methods in self.methods.items():
            node = self.source(place.module).definitions[place.name]
            assert isinstance(node, ast.ClassDef)
            for name in [name for name, read in methods.items() if read is None]:
                if not (place.module in self.keeping or _is_called_by_torch(name) or name in self.attributes):
                    continue
                reader = self._reader(place.module)
                reader.owner = node
                found = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == name]
                if any(ast.unparse(d).startswith(VALIDATORS) for one in found for d in one.decorator_list):
                    continue
                if place not in self.held:
                    self.held[place] = self._constants_of(node, place.module)
                reader.of_owner = self.held[place]
                for one in found:
                    reader.visit(one)
                methods[name] = reader.found
                needed += self._needs(reader.found)
        return needed

    def _constants_of(self, node: ast.ClassDef, module: str) -> dict[str, object]:
        """Attributes of a class's objects that always have one value."""
        reader = self._reader(module)
        reader.owner = node
        for one in node.body:
            if isinstance(one, ast.FunctionDef):
                reader.visit(one)
        return reader.of_owner

    # ---- what is written ----

    @functools.cached_property
    def order(self) -> list[Place]:
        """Every definition after those that it refers to at once: modules as they import each other, lines in them."""
        modules: list[str] = []

        def walk(module: str, above: tuple[str, ...] = ()) -> None:
            if module in modules or module in above:
                return
            for found in self.source(module).imports.values():
                if found.module == OURS:  # public names, which lie elsewhere
                    for one in sorted(self._used_by(module)):
                        walk(one, (*above, module))
                elif self._is_ours(found.module):
                    inside = f"{found.module}.{found.name}"
                    walk(inside if inside in self.sources else found.module, (*above, module))
            modules.append(module)

        walk(PORTABLE)
        for place in sorted(self.reads):
            walk(place.module)
        wanted = sorted(p for p in self.reads if p not in self.constants)
        placed = sorted(wanted, key=lambda p: (modules.index(p.module), self.source(p.module).definitions[p.name].lineno))
        for place, (_, needs) in self.constants.items():
            if place in self.reads:
                placed.insert(max((placed.index(one) + 1 for one in needs), default=0), place)
        return self._after_their_needs(placed)

    def _used_by(self, module: str) -> set[str]:
        """The modules of the definitions that those of a module refer to."""
        reads = [read for place, read in self.reads.items() if place.module == module]
        return {r.meaning.module for read in reads for r in read.references if isinstance(r.meaning, Place)} - {module}

    def _after_their_needs(self, placed: list[Place]) -> list[Place]:
        """Definitions that stand for others may come from modules further down."""
        done: dict[Place, None] = {}

        def put(place: Place, above: tuple[Place, ...] = ()) -> None:
            if place in done or place in above:
                return
            node = self._node(place)
            if isinstance(node, ast.ClassDef):
                for reference in self.reads[place].references:
                    if isinstance(reference.meaning, Place) and not reference.annotation:
                        put(reference.meaning, (*above, place))
            done[place] = None

        for place in placed:
            put(place)
        return list(done)

    @functools.cached_property
    def names(self) -> dict[Place, str]:
        """Each definition's name in the bundle."""
        often = Counter(place.name for place in self.reads)
        outside = {alias for alias, _ in self._outside()}
        shadowed = {p for read in self._all_reads() for r in read.references if isinstance(p := r.meaning, Place) and p.name in r.local}
        return {
            place: f"{place.name}_of_{place.module.rpartition('.')[2]}" if often[place.name] > 1 or place.name in outside or place in shadowed
            else place.name for place in self.reads
        }  # fmt: skip

    def _all_reads(self) -> list[Read]:
        return [*self.reads.values(), *(read for methods in self.methods.values() for read in methods.values() if read is not None)]

    def _outside(self) -> set[tuple[str, Outside]]:
        """(name, what it is) of everything from other packages."""
        found = set()
        for read in self._all_reads():
            for reference in read.references:
                if isinstance(reference.meaning, Outside):
                    assert isinstance(reference.node, ast.Name)
                    found.add((reference.node.id, reference.meaning))
        return found | {("Any", Outside("typing", "Any"))}

    def imports(self) -> str:
        """The lines that bring in other packages."""
        named: dict[str, set[str]] = {}
        plain: set[str] = set()
        everything = self._outside()
        whole = {(alias, found.module) for alias, found in everything if found.name is None}
        for alias, found in everything:
            if (alias, f"{found.module}.{found.name}") in whole:  # the same module, brought in otherwise elsewhere
                continue
            if found.name is None:
                plain.add(f"import {found.module}" + (f" as {alias}" if alias != found.module.partition(".")[0] else ""))
            else:
                named.setdefault(found.module, set()).add(found.name + (f" as {alias}" if alias != found.name else ""))
        lines = [*sorted(plain), *(f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(named.items()))]
        return "\n".join(lines)

    def text(self) -> str:
        """All of it but a docstring."""
        parts = ["from __future__ import annotations\n", self.imports()]
        module, assigned = "", False
        for place in self.order:
            block = isinstance(self._node(place), (ast.ClassDef, ast.FunctionDef))
            apart = block or not assigned
            if place.module != module:
                module = place.module
                parts.append(f"\n\n# ---- {module.removeprefix(f'{OURS}.').replace('.', '/')}.py ----")
                apart = block
            parts.append(("\n\n" if apart else "") + self._definition(place))
            assigned = not block
        return TOLD_TO_TOOLS.sub("", "\n".join(parts)) + "\n"

    def _definition(self, place: Place) -> str:
        if place in self.constants:
            return f"{place.name} = {self._constant_text(place)}"
        source = self.source(place.module)
        node = source.definitions[place.name]
        edits = [*self.reads[place].edits, *self._renamed(source, self.reads[place].references)]
        if isinstance(node, ast.ClassDef):
            edits += self._without_methods(place, node, source)
        if self.names[place] != place.name:
            edits.append(self._own_name(source, node, self.names[place], place.name))
        return _edited(source, source.lines[source.first_line(node)], source.lines[int(node.end_lineno or 0)], edits)

    def _constant_text(self, place: Place) -> str:
        text = self.constants[place][0]
        for one in self.constants[place][1]:
            text = re.sub(rf"\b{one.name}\b", self.names[one], text)
        return text

    def _own_name(self, source: Source, node: ast.stmt, new: str, old: str) -> Edit:
        start = source.span(node)[0]
        at = re.compile(rf"\b{old}\b".encode()).search(source.data, start)
        assert at is not None
        return Edit(*at.span(), new)

    def _renamed(self, source: Source, references: list[Reference]) -> list[Edit]:
        edits = []
        for reference in references:
            written = source.text(reference.node)
            if isinstance(reference.meaning, Place):
                name = self.names.get(reference.meaning, "Any")  # of a type that is not there
                if name != written:
                    edits.append(Edit(*source.span(reference.node), name))
        return edits

    def _without_methods(self, place: Place, node: ast.ClassDef, source: Source) -> list[Edit]:
        edits: list[Edit] = []
        left = 0
        for one in node.body:
            read = self.methods[place].get(one.name) if isinstance(one, ast.FunctionDef) else None
            if (isinstance(one, ast.FunctionDef) and read is None) or _names(one) & set(DROPPED_FIELDS):
                edits.append(source.whole_lines(source.first_line(one), int(one.end_lineno or 0)))
                continue
            left += 1
            if read is not None:
                edits += [*read.edits, *self._renamed(source, read.references)]
        if not left:
            raise ConfigError(f"{place.module}: nothing is left of the class {place.name}; give it a docstring")
        return edits


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # what would hold it is no package
        return False


def _is_called_by_torch(name: str) -> bool:
    return name.startswith("__") or hasattr(nn.Module, name) or hasattr(torch.autograd.Function, name)


def _names(node: ast.stmt) -> set[str]:
    """What a statement of a class's body assigns to."""
    targets: list[Any] = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _edited(source: Source, start: int, end: int, edits: list[Edit]) -> str:
    """Bytes [start, end) with the edits made; one inside another is covered by it."""
    parts, at = [], start
    for edit in sorted(set(edits), key=lambda e: (e.start, -e.end)):
        if edit.end <= at and edit.start < at:
            continue
        parts += [source.data[at : max(at, edit.start)], edit.text.encode()]
        at = max(at, edit.end)
    return b"".join([*parts, source.data[at:end]]).decode().rstrip()
