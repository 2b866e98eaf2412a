"""What a reader of the code can lean on: every public name says what it is, in which shapes and units, and which errors it raises.

The surface: modules without an underscore in the rooms below, their public functions and classes, and the public methods of
those. Read as text, so that no optional package is needed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

import treadle

ROOT = Path(treadle.__file__).parent
ROOMS = ("checkpoint", "data", "distributed", "evaluation", "generation", "layers", "models", "monitor", "objectives", "ops",
         "planning", "storage", "text", "training")  # fmt: skip
MODULES = ("distillation", "errors", "library", "recipe", "registry", "settings", "trusted_code")
# Bases from elsewhere: what their methods do is documented there.
FOREIGN = {"ast.NodeVisitor", "GenerationMixin", "PreTrainedModel", "TemplateLM"}
SHAPE = re.compile(r"\[|scalar|any shape", re.I)
# Numbers that mean nothing without a unit, by the names of the functions that return them, and the units.
QUANTITY = re.compile(
    r"age\b|budget|bytes?|cost|delay|duration|flops|gb\b|length|limit|loss|memory|rate(?!d)|second|size|speed|throughput|time|traffic|width"
)
UNIT = re.compile(
    r"(?<![a-zA-Z])(?:nat|bit|second|hour|n?byte|token|step|row|position|parameter|operation|flop|share|ratio|number|document|channel|logit|id"
    r"|head|layer|thread|chunk|line)s?\b|gb\b|gigabyte", re.I
)  # fmt: skip
PAPER = re.compile(r"arXiv|et al\.|\b(?:19|20)\d\d\b")
# Things that a user chooses by name and that nobody published.
OWN = {"collatz", "collatz_delay", "inl", "next_token"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def files(rooms: tuple[str, ...]) -> list[Path]:
    found = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    return [path for path in found if not path.name.startswith("_")]


@cache
def surface() -> dict[str, list[Path]]:
    """Room -> its public files."""
    return {**{room: files((room,)) for room in ROOMS}, "treadle": [ROOT / f"{name}.py" for name in MODULES]}


@cache
def classes() -> dict[str, list[ast.ClassDef]]:
    found: dict[str, list[ast.ClassDef]] = {}
    for path in files(ROOMS) + surface()["treadle"]:
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    return found


def bases(cls: ast.ClassDef, seen: frozenset[str] = frozenset()) -> Iterator[ast.ClassDef]:
    """The classes of treadle that a class derives from, by name."""
    for base in cls.bases:
        name = ast.unparse(base).split("[")[0].split(".")[-1]
        if name not in seen:
            for one in classes().get(name, []):
                yield one
                yield from bases(one, seen | {name})


def names(path: Path) -> Iterator[tuple[str, ast.ClassDef | Function, ast.ClassDef | None]]:
    """(dotted name, definition, its class) of everything public in a file."""
    for node in tree_of(path).body:
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)) and not node.name.startswith("_"):
            yield node.name, node, None
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    accessor = isinstance(inner, FUNCTIONS) and any(
                        ".setter" in ast.unparse(d) for d in inner.decorator_list
                    )
                    if isinstance(inner, FUNCTIONS) and not inner.name.startswith("_") and not accessor:
                        yield f"{node.name}.{inner.name}", inner, node


def is_foreign(cls: ast.ClassDef | None) -> bool:
    return cls is not None and bool(FOREIGN & {ast.unparse(base) for base in cls.bases})


def documentation(node: ast.ClassDef | Function, cls: ast.ClassDef | None, of_class: bool) -> str:
    """The docstring of a definition and of what it overrides; with `of_class`, of the classes around them too."""
    found = [ast.get_docstring(node) or ""]
    around = [] if cls is None else [cls, *bases(cls)]
    for one in around:
        found += [
            ast.get_docstring(inner) or ""
            for inner in one.body
            if isinstance(inner, FUNCTIONS) and inner.name == node.name
        ]
        found += [ast.get_docstring(one) or ""] if of_class else []
    return " ".join("\n".join(found).split())


def mentions_tensors(function: Function) -> bool:
    given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    written = [ast.unparse(part.annotation) for part in given if part.annotation is not None]
    written += [ast.unparse(function.returns)] if function.returns is not None else []
    return any(re.search(r"(?<!\w)Tensor\b", text) for text in written)


def returns_a_quantity(function: Function) -> bool:
    typed = function.returns is not None and re.search(r"\b(?:float|int)\b", ast.unparse(function.returns))
    return bool(typed and QUANTITY.search(function.name))


@cache
def our_errors() -> dict[str, set[str]]:
    """Error -> itself and the errors of ours that it is one of."""
    found = {node.name: node for node in tree_of(ROOT / "errors.py").body if isinstance(node, ast.ClassDef)}

    def line(name: str) -> set[str]:
        return {name}.union(*(line(ast.unparse(base)) for base in found[name].bases if ast.unparse(base) in found))

    return {name: line(name) for name in found}


def raised(function: Function) -> set[str]:
    """Errors of ours that the body itself raises; functions inside it have bodies of their own."""
    found: set[str] = set()
    todo: list[ast.AST] = list(function.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Raise) and node.exc is not None:
            what = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            found |= {ast.unparse(what).split(".")[-1]} & set(our_errors())
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
            todo += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("room", surface())
def test_every_public_name_says_what_it_is(room: str) -> None:
    bare = []
    for path in surface()[room]:
        if not ast.get_docstring(tree_of(path)):
            bare.append(f"{path.relative_to(ROOT)}: the module")
        for name, node, cls in names(path):
            if not documentation(node, cls, of_class=False) and not is_foreign(cls):
                bare.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    assert not bare, "write a docstring:\n" + "\n".join(bare)


def silent_functions(room: str, concerns: Callable[[Function], bool], says: Callable[[Function, ast.ClassDef | None], bool]) -> list[str]:
    """The public functions of a room that a rule concerns and that do not say what it asks for."""
    return [
        f"{path.relative_to(ROOT)}:{node.lineno} {name}"
        for path in surface()[room]
        for name, node, cls in names(path)
        if isinstance(node, FUNCTIONS) and not is_foreign(cls) and concerns(node) and not says(node, cls)
    ]


@pytest.mark.parametrize("room", surface())
def test_whoever_takes_tensors_says_their_shapes(room: str) -> None:
    """`x [B, T, D] -> [B, T, D]`, "a scalar" or "of any shape", at the function, at what it overrides or at the class."""
    silent = silent_functions(room, mentions_tensors, lambda node, cls: bool(SHAPE.search(documentation(node, cls, of_class=True))))
    assert not silent, "say the shapes:\n" + "\n".join(silent)


@pytest.mark.parametrize("room", surface())
def test_whoever_returns_a_quantity_says_its_unit(room: str) -> None:
    """In the docstring, or in the name."""
    silent = silent_functions(
        room, returns_a_quantity, lambda node, cls: bool(UNIT.search(f"{node.name} {documentation(node, cls, of_class=False)}"))
    )
    assert not silent, "say the unit:\n" + "\n".join(silent)


@pytest.mark.parametrize("room", surface())
def test_whoever_raises_an_error_of_ours_names_it(room: str) -> None:
    silent = []
    for path in surface()[room]:
        for name, node, cls in names(path):
            if isinstance(node, FUNCTIONS):
                text = documentation(node, cls, of_class=True)
                unsaid = {
                    error
                    for error in raised(node)
                    if not any(re.search(rf"\b{one}\b", text) for one in our_errors()[error])
                }
                silent += (
                    [f"{path.relative_to(ROOT)}:{node.lineno} {name}: {', '.join(sorted(unsaid))}"] if unsaid else []
                )
    assert not silent, "name the errors:\n" + "\n".join(silent)


def places(kind: str) -> dict[str, str]:
    """Name -> module:attribute of what a user chooses by name."""
    from treadle.layers.token_mixers import TOKEN_MIXERS
    from treadle.models.catalogue import MODELS
    from treadle.objectives.base import OBJECTIVES
    from treadle.training.optim import OPTIMIZERS

    registry = {"model": MODELS, "token mixer": TOKEN_MIXERS, "objective": OBJECTIVES, "optimizer": OPTIMIZERS}[kind]
    return {name: place for name, place in registry._places.items() if place.startswith("treadle.")}


@pytest.mark.parametrize("kind", ["model", "token mixer", "objective", "optimizer"])
def test_what_comes_from_a_paper_names_it(kind: str) -> None:
    """At the class or function, or at its module; what nobody published is in OWN."""
    silent = []
    for name, place in places(kind).items():
        module, _, attribute = place.partition(":")
        tree = tree_of(ROOT.parent / (module.replace(".", "/") + ".py"))
        texts = [ast.get_docstring(tree) or ""]
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, *FUNCTIONS)) and node.name == attribute:
                texts.append(ast.get_docstring(node) or "")
        if not PAPER.search("\n".join(texts)) and name not in OWN:
            silent.append(f"{kind} {name} ({place})")
    assert not silent, "name the paper, or write the name into OWN:\n" + "\n".join(silent)


def test_type_checkers_see_every_name_of_the_package() -> None:
    """What loads on first use is imported under TYPE_CHECKING from the same place, in the form that hands it on to users under
    mypy --strict (`import X as X`, or an assignment); and the marker of PEP 561 is there."""
    imported, seen = dict[str, str](), dict[str, str]()
    for node in ast.walk(tree_of(ROOT / "__init__.py")):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("treadle."):
            imported |= {alias.name: f"{node.module}:{alias.name}" for alias in node.names}
            seen |= {alias.name: imported[alias.name] for alias in node.names if alias.asname == alias.name}
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
            seen |= {ast.unparse(node.targets[0]): imported[node.value.id]}
    assert {name: place for name, place in treadle._PLACES.items() if seen.get(name) != place} == {}
    assert (ROOT / "py.typed").is_file()
