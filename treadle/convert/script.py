"""What a Python file says in constants: read from its syntax tree, never executed."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treadle.errors import ConfigError, InputError

# Calls and classes whose keywords and fields are a trainer's arguments.
ARGUMENTS = re.compile(r"(Training|Model|Data|Script)Arguments$|(Train|Training|Trainer|Model|Data|SFT|DPO|SHC|Lora|Optimizer)Config$")
LARGEST = 1 << 256  # a constant beyond it is no setting of a trainer, and a tower of powers takes no end
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_WORDS = {"float32", "float16", "bfloat16"}  # torch.bfloat16 is a word here


class Computed(Exception):
    """An expression whose value only running the script could tell."""


@dataclass
class Script:
    """A file's constants, the arguments of its trainer, what it imports, and the names that it computes."""

    path: Path
    constants: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)  # by the name of the class that takes them
    flags: dict[str, Any] = field(default_factory=dict)  # argparse: add_argument("--name", default=...)
    used: set[str] = field(default_factory=set)  # constants that others are computed from
    computed: dict[str, int] = field(default_factory=dict)  # name -> line
    imports: set[str] = field(default_factory=set)
    base_model: str | None = None  # of SomeModel.from_pretrained("name")


def read_script(path: Path) -> Script:
    """The constants of a .py file. InputError where it is no Python, or cannot be read."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as problem:
        raise InputError(f"{path} is not valid Python: {problem}") from None
    except OSError as problem:
        raise InputError(f"{path} cannot be read: {problem}") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deep to be a configuration") from None
    script = Script(path)
    for statement in tree.body:
        _assign(script, statement, script.constants)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            script.imports |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            script.imports.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Call):
            _call(script, node)
        elif isinstance(node, ast.ClassDef) and ARGUMENTS.search(node.name):
            own = script.arguments.setdefault(node.name, {})
            for statement in node.body:
                _assign(script, statement, own)
    return script


def _assign(script: Script, statement: ast.stmt, into: dict[str, Any]) -> None:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target, value = statement.targets[0], statement.value
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        target, value = statement.target, statement.value
    else:
        return
    if isinstance(target, ast.Name) and not target.id.startswith("_"):
        _keep(script, into, target.id, value)


def _keep(script: Script, into: dict[str, Any], name: str, value: ast.expr) -> None:
    try:
        into[name] = value_of(value, script.constants)
        script.computed.pop(name, None)
        script.used |= {node.id for node in ast.walk(value) if isinstance(node, ast.Name) and node.id in script.constants}
    except Computed:
        into.pop(name, None)
        thing = isinstance(value, (ast.Call, ast.ListComp, ast.DictComp, ast.Lambda)) and into is script.constants and not name.isupper()
        if not thing:  # model = Model(...) is an object, no setting; NUM_WORKERS = cpu_count() is one
            script.computed[name] = value.lineno


def _call(script: Script, node: ast.Call) -> None:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
    if name == "add_argument" and node.args:
        words = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        long = next((word[2:] for word in words if word.startswith("--")), None)
        default = next((keyword.value for keyword in node.keywords if keyword.arg == "default"), None)
        if long and default is not None:
            _keep(script, script.flags, long.replace("-", "_"), default)
    elif name == "from_pretrained" and node.args and script.base_model is None and "Model" in ast.unparse(node.func):
        try:
            script.base_model = str(value_of(node.args[0], script.constants))
        except Computed:
            return
    elif ARGUMENTS.search(name):
        own = script.arguments.setdefault(name, {})
        for keyword in node.keywords:
            if keyword.arg is not None:
                _keep(script, own, keyword.arg, keyword.value)


def value_of(node: ast.expr, constants: dict[str, Any]) -> Any:
    """The value of a constant expression: literals, arithmetic, names assigned before. Computed for anything else."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, (bytes, complex)) or node.value is Ellipsis:
            raise Computed
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in constants:
            raise Computed
        return constants[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [value_of(item, constants) for item in node.elts]
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        return {str(key.value): value_of(value, constants) for key, value in zip(node.keys, node.values, strict=True) if isinstance(key, ast.Constant)}
    if isinstance(node, ast.Attribute) and node.attr in _WORDS:
        return node.attr
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd, ast.Not)):
        value = value_of(node.operand, constants)
        if isinstance(node.op, ast.Not):
            return not value
        return _number(-value if isinstance(node.op, ast.USub) and _is_number(value) else value)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = value_of(node.left, constants), value_of(node.right, constants)
        if isinstance(node.op, ast.Add) and isinstance(left, str) and isinstance(right, str):
            return left + right
        left, right = _number(left), _number(right)
        if isinstance(node.op, ast.Pow) and (abs(right) > 256 or abs(left) > 1e6):
            raise Computed
        try:
            return _number(_BINARY[type(node.op)](left, right))
        except (ArithmeticError, ValueError):
            raise Computed from None
    raise Computed


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any) -> Any:
    if not _is_number(value) or abs(value) > LARGEST:
        raise Computed
    return value


def refuse_task(script: Script) -> None:
    """ConfigError for a file of treadle's own classes, which is trained as it stands."""
    if "treadle" in script.imports:
        raise ConfigError(f"{script.path} is written for treadle; train it as it stands: treadle train {script.path}")
