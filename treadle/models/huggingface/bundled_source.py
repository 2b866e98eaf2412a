"""The source of one module as a bundle takes it: its definitions, what their names mean, and what of them is left where some
functions always give the same answer (kernels that a bundle does not carry: None, False).

Text stays as it is written, comments included; what changes are spans of it (`Edit`).
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from treadle.errors import ConfigError


class Place(NamedTuple):
    """A definition: the module's name and the name in it."""

    module: str
    name: str


class Outside(NamedTuple):
    """Something of another package: `import module` or `from module import name`."""

    module: str
    name: str | None


class Edit(NamedTuple):
    """Bytes [start, end) of a module's text become `text`."""

    start: int
    end: int
    text: str


Meaning = Place | Outside | str | None  # str: a module of ours; None: a builtin, or nothing known
UNKNOWN = object()
Scoped = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Source:
    """A module's text and tree, and its top-level names."""

    def __init__(self, name: str) -> None:
        self.name = name
        found = sys.modules.get(name) or importlib.util.find_spec(name)  # found without being imported
        self.path = Path(str(getattr(found, "__file__", None) or getattr(found, "origin", None)))
        self.data = self.path.read_bytes()
        self.tree = ast.parse(self.data)
        self.lines = [0]
        for line in self.data.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.definitions: dict[str, ast.stmt] = {}
        self.imports: dict[str, Outside] = {}
        for statement in self.tree.body:
            self._enter(statement)

    def _enter(self, statement: ast.stmt) -> None:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            self.definitions[statement.name] = statement
        elif isinstance(statement, ast.Import):
            for one in statement.names:
                self.imports[one.asname or one.name.partition(".")[0]] = Outside(one.name if one.asname else one.name.partition(".")[0], None)
        elif isinstance(statement, ast.ImportFrom):
            for one in statement.names:
                self.imports[one.asname or one.name] = Outside(str(statement.module), one.name)
        elif not isinstance(statement, ast.Expr) and not (isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"):
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    self.definitions[node.id] = statement

    def span(self, node: ast.AST) -> tuple[int, int]:
        """The bytes of a node."""
        first = node.lineno, node.col_offset  # type: ignore[attr-defined]
        last = node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]
        return self.lines[first[0] - 1] + first[1], self.lines[last[0] - 1] + last[1]

    def text(self, node: ast.AST) -> str:
        """The text of a node."""
        start, end = self.span(node)
        return self.data[start:end].decode()

    def first_line(self, node: ast.stmt) -> int:
        """Of a statement with its decorators and the comments right above it; from 0."""
        line = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))]) - 1
        indent = b" " * node.col_offset
        while line and self.line(line - 1).startswith(indent + b"#") and not self.line(line - 1).startswith(indent + b"# ----"):
            line -= 1
        return line

    def line(self, number: int) -> bytes:
        """A line of the file, counted from 0."""
        return self.data[self.lines[number] : self.lines[number + 1]]

    def whole_lines(self, first: int, last: int) -> Edit:
        """Takes out lines [first, last), from 0, and the blank ones before them."""
        while first and not self.line(first - 1).strip():
            first -= 1
        return Edit(self.lines[first], self.lines[last], "")

    def dedented(self, first: int, last: int) -> Iterator[Edit]:
        """Lines [first, last) one level further left."""
        for number in range(first, last):
            if self.line(number).startswith(b"    "):
                yield Edit(self.lines[number], self.lines[number] + 4, "")


def bound_names(node: ast.AST) -> list[str]:
    """Names that a function (or comprehension) binds itself, as often as it does."""
    found: list[str] = []
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        a = node.args
        found += [one.arg for one in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg)))]
    todo: list[ast.AST] = list(node.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else ast.iter_child_nodes(node))
    while todo:
        one = todo.pop()
        if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store):
            found.append(one.id)
        elif isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.append(one.name)
        elif isinstance(one, (ast.Import, ast.ImportFrom)):
            found += [alias.asname or alias.name.partition(".")[0] for alias in one.names]
        elif isinstance(one, ast.ExceptHandler) and one.name:
            found.append(one.name)
        if isinstance(one, Scoped):
            todo += [inner.target for inner in ast.walk(one) if isinstance(inner, ast.NamedExpr)]
        else:
            todo += list(ast.iter_child_nodes(one))
    return found


@dataclass
class Reference:
    """A place of the text that means a definition. node: a name, or an attribute of a module. annotation: it is not evaluated."""

    node: ast.expr
    meaning: Meaning
    annotation: bool
    local: frozenset[str]  # names that functions around bind


@dataclass
class Read:
    """What a definition, or a part of one, refers to, and how its text changes."""

    references: list[Reference] = field(default_factory=list)
    attributes: set[str] = field(default_factory=set)
    edits: list[Edit] = field(default_factory=list)


class Reader(ast.NodeVisitor):
    """Reads definitions of one module. `meaning` says what a global name is, `inside` what one of a module of ours is, `constant`
    the answer of a function that always gives the same, else UNKNOWN; option: the function whose calls stand for their first argument; fixed: what names of this module (and
    attributes of `self` and `ctx`) always are."""

    def __init__(
        self, source: Source, meaning: Callable[[str, str], Meaning], inside: Callable[[str, str, Source], Meaning],
        constant: Callable[[Place], object], option: Place, fixed: Mapping[str, object],
    ) -> None:  # fmt: skip
        self.source, self.meaning, self.inside, self.constant, self.option, self.fixed = source, meaning, inside, constant, option, fixed
        self.found = Read()
        self.scopes: list[list[str]] = []
        self.known: list[dict[str, object]] = [{}]
        self.owner: ast.ClassDef | None = None
        self.of_owner: dict[str, object] = {}
        self.annotation = False
        self.live: set[str] = set()  # names that are read
        self.idle: set[str] = set()  # variables that nothing reads any more

    # ---- names ----

    def global_meaning(self, name: str) -> Meaning:
        """What a name means in the module; None where a function around it binds it."""
        return None if any(name in scope for scope in self.scopes) else self.meaning(self.source.name, name)

    def _meant(self, node: ast.expr) -> Meaning:
        """What a name or a module's attribute is."""
        if isinstance(node, ast.Name):
            return self.global_meaning(node.id)
        if isinstance(node, ast.Attribute):
            held = self._meant(node.value)
            if isinstance(held, str):
                return self.inside(held, node.attr, self.source)
        return None

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.live.add(node.id)
        meaning = self.global_meaning(node.id)
        if meaning is not None:
            self._refer(node, meaning)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        meaning = self._meant(node)
        if meaning is not None:
            self._refer(node, meaning)
            return
        if isinstance(node.ctx, ast.Load):
            self.found.attributes.add(node.attr)
        self.visit(node.value)

    def _refer(self, node: ast.expr, meaning: Meaning) -> None:
        local = frozenset(name for scope in self.scopes for name in scope)
        self.found.references.append(Reference(node, meaning, self.annotation, local))

    def visit_annotation(self, node: ast.expr | None) -> None:
        if node is not None:
            before, self.annotation = self.annotation, True
            self.visit(node)
            self.annotation = before

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.visit_annotation(node.annotation)
        self.visit(node.target)
        if node.value is not None:
            self.visit(node.value)

    # ---- scopes ----

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for one in node.decorator_list:
            self.visit(one)
        self._arguments(node.args)
        self.visit_annotation(node.returns)
        self.scopes.append(bound_names(node))
        before = self.found, self.idle, self.live
        while True:  # what is left may leave variables idle, and without these others
            self.known.append({})
            self.found, self.live = Read(), set()
            self.block(node.body)
            self.known.pop()
            idle = {n for n in set(self.scopes[-1]) - self.live if self._was_read(node, n)} | self.idle
            if idle == self.idle:
                break
            self.idle = idle
        self.scopes.pop()
        found, live = self.found, self.live
        self.found, self.idle, self.live = before[0], before[1], before[2] | live
        self.found.references += found.references
        self.found.attributes |= found.attributes
        self.found.edits += found.edits

    def _was_read(self, function: ast.FunctionDef, name: str) -> bool:
        return any(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) for n in ast.walk(function))

    def _arguments(self, a: ast.arguments) -> None:
        for default in (*a.defaults, *a.kw_defaults):
            if default is not None:
                self.visit(default)
        for one in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))):
            self.visit_annotation(one.annotation)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._arguments(node.args)
        self.scopes.append(bound_names(node))
        self.known.append({})
        self.visit(node.body)
        self.scopes.pop()
        self.known.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Nothing that is bundled has one inside a function: ConfigError."""
        raise ConfigError(f"{self.source.name}: a class inside a function ({node.name}) is not bundled")

    def _comprehension(self, node: ast.expr) -> None:
        self.scopes.append([n.id for c in node.generators for n in ast.walk(c.target) if isinstance(n, ast.Name)])  # type: ignore[attr-defined]
        self.known.append({})
        self.generic_visit(node)
        self.scopes.pop()
        self.known.pop()

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension

    # ---- what is left ----

    def visit(self, node: ast.AST) -> None:
        stored = isinstance(getattr(node, "ctx", None), ast.Store)
        if isinstance(node, ast.expr) and not isinstance(node, (ast.Constant, ast.Name)) and not self.annotation and not stored:
            value = self.value(node)
            if value is not UNKNOWN:
                self.found.edits.append(Edit(*self.source.span(node), repr(value)))
                return
        super().visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if self._meant(node.func) == self.option and not any(keyword.arg == "default_factory" for keyword in node.keywords):
            if node.args:
                self.found.edits.append(Edit(*self.source.span(node), self.source.text(node.args[0])))
                self.visit(node.args[0])
            else:
                self.found.edits.append(Edit(*self.source.span(node), "None"))
            return
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr") and isinstance(node.args[1], ast.Constant):
            self.found.attributes.add(str(node.args[1].value))
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        test = self.value(node.test)
        if test is UNKNOWN:
            self.generic_visit(node)
            return
        left = node.body if test else node.orelse
        (start, end), (first, last) = self.source.span(node), self.source.span(left)
        self.found.edits += [Edit(start, first, ""), Edit(last, end, "")]
        self.visit(left)

    def visit_Assign(self, node: ast.Assign) -> None:
        value, target = self.value(node.value), node.targets[0]
        if value is not UNKNOWN and len(node.targets) == 1:
            if isinstance(target, ast.Name) and self.scopes and self.scopes[-1].count(target.id) == 1:
                self.known[-1][target.id] = value
            elif isinstance(target, ast.Attribute) and ast.unparse(target.value) in ("self", "ctx") and self._written(target.attr) == 1:
                self.of_owner[target.attr] = value
        if isinstance(target, ast.Name) and target.id in self.idle and len(node.targets) == 1:
            self._replace(node.lineno - 1, int(node.end_lineno or 0))
            return
        self.generic_visit(node)

    def _written(self, attribute: str) -> int:
        if self.owner is None:
            return 0
        return sum(isinstance(n, ast.Attribute) and n.attr == attribute and isinstance(n.ctx, ast.Store) for n in ast.walk(self.owner))

    def value(self, node: ast.expr) -> object:
        """None, True or False where an expression always has this value (False: or another that counts as it), else UNKNOWN."""
        if isinstance(node, ast.Constant):
            return node.value if node.value is None or isinstance(node.value, bool) else UNKNOWN
        if isinstance(node, ast.Name):
            return next((known[node.id] for known in (*reversed(self.known), self.fixed) if node.id in known), UNKNOWN)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "ctx"):
            return self.of_owner.get(node.attr, self.fixed.get(node.attr, UNKNOWN))
        if isinstance(node, ast.Call):
            return self._answer(node.func)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self.value(node.operand)
            return UNKNOWN if inner is UNKNOWN else not inner
        if isinstance(node, ast.BoolOp):
            values = [self.value(one) for one in node.values]
            decisive = isinstance(node.op, ast.Or)
            if any(one is not UNKNOWN and bool(one) is decisive for one in values):
                return decisive
            return UNKNOWN if UNKNOWN in values else not decisive
        if isinstance(node, ast.IfExp):
            test, first, second = (self.value(one) for one in (node.test, node.body, node.orelse))
            return first if first is second or test is True else (second if test is False or test is None else UNKNOWN)
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot)) and ast.unparse(node.comparators[0]) == "None":
            left = self.value(node.left)
            return UNKNOWN if left is UNKNOWN else (left is None) is isinstance(node.ops[0], ast.Is)
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq) and isinstance(node.comparators[0], ast.Constant):
            left = self.value(node.left)
            return UNKNOWN if left is UNKNOWN else left == node.comparators[0].value
        return UNKNOWN

    def _answer(self, function: ast.expr) -> object:
        meaning = self._meant(function)
        if isinstance(meaning, Place):
            return self.constant(meaning)
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "self" and self.owner:
            for one in self.owner.body:
                if isinstance(one, ast.FunctionDef) and one.name == function.attr:
                    return self.answer_of(one)
        return UNKNOWN

    def answer_of(self, function: ast.FunctionDef) -> object:
        """What a function always returns."""
        returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
        if not returned or not isinstance(function.body[-1], ast.Return) or any(
            isinstance(n, (ast.Yield, ast.YieldFrom, ast.Lambda)) for n in ast.walk(function)
        ):  # fmt: skip
            return UNKNOWN
        self.scopes.append(bound_names(function))
        self.known.append({})
        values = {repr(v): v for v in (UNKNOWN if one is None else self.value(one) for one in returned)}
        self.scopes.pop()
        self.known.pop()
        return next(iter(values.values())) if len(values) == 1 else UNKNOWN

    def block(self, statements: list[ast.stmt]) -> bool:
        """Statements one after the other; whether the last that is left leaves the function."""
        for number, statement in enumerate(statements):
            ended = self._if(statement) if isinstance(statement, ast.If) else self._statement(statement)
            if ended and number + 1 < len(statements):
                self.found.edits.append(self.source.whole_lines(self.source.first_line(statements[number + 1]), int(statements[-1].end_lineno or 0)))
            if ended:
                return True
        return False

    def _statement(self, node: ast.stmt) -> bool:
        for field_name in ("body", "orelse", "finalbody"):
            if isinstance(getattr(node, field_name, None), list) and not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                break
        else:
            self.visit(node)
            return isinstance(node, (ast.Return, ast.Raise))
        if isinstance(node, (ast.With, ast.AsyncWith)):
            for item in node.items:
                self.visit(item)
            return self.block(node.body)
        for name, value in ast.iter_fields(node):
            if name in ("body", "orelse", "finalbody"):
                self.block(value)
            elif isinstance(value, ast.AST):
                self.visit(value)
            elif isinstance(value, list):
                for one in value:
                    if isinstance(one, ast.ExceptHandler):
                        if one.type is not None:
                            self.visit(one.type)
                        self.block(one.body)
                    elif isinstance(one, ast.AST):
                        self.visit(one)
        return False

    def _if(self, node: ast.If, is_elif: bool = False) -> bool:
        value = self.value(node.test)
        source, begin, last = self.source, node.lineno - 1, int(node.end_lineno or 0)
        body_last = int(node.body[-1].end_lineno or 0)
        if value is UNKNOWN:
            self.visit(node.test)
            ends = self.block(node.body)
            if not node.orelse:
                return False
            first = node.orelse[0]
            other = self._if(first, True) if isinstance(first, ast.If) and source.text(node.orelse[0]).startswith("elif") else self.block(node.orelse)
            return ends and other
        if value:
            if is_elif:
                self._replace(begin, node.body[0].lineno - 1, " " * node.col_offset + "else:\n")
            else:
                self._replace(begin, node.body[0].lineno - 1)
                self.found.edits += source.dedented(node.body[0].lineno - 1, body_last)
            self._replace(body_last, last)
            return self.block(node.body)
        if not node.orelse:
            self._replace(begin, last)
            return False
        first = node.orelse[0]
        if isinstance(first, ast.If) and source.text(first).startswith("elif"):
            self._replace(begin, first.lineno - 1)
            if not is_elif:
                start = source.span(first)[0]
                self.found.edits.append(Edit(start, start + 2, ""))
            return self._if(first, is_elif)
        if is_elif:  # the line of `else` stays
            self._replace(begin, next(n for n in range(first.lineno - 2, begin, -1) if source.line(n).strip().startswith(b"else")))
        else:
            self._replace(begin, first.lineno - 1)
            self.found.edits += source.dedented(first.lineno - 1, last)
        return self.block(node.orelse)

    def _replace(self, first: int, last: int, text: str = "") -> None:
        """Lines [first, last), from 0, by others."""
        if last > first:
            self.found.edits.append(Edit(self.source.lines[first], self.source.lines[last], text))
