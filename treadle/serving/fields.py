"""Reading one field of a request's body: its kind and its range, or an error that names it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from treadle.serving.limits import RequestError


def parsed(body: bytes) -> dict[str, Any]:
    """A request's body as a table; RequestError 400 for anything else, NaN and nesting without end included."""
    try:
        table = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as problem:
        reason = "it is nested too deeply" if isinstance(problem, RecursionError) else str(problem)[:200]
        raise RequestError(400, f"the body is not JSON: {reason}") from None
    if not isinstance(table, dict):
        raise RequestError(400, "the body is not a JSON object")
    return table


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def bad(name: str, expected: str) -> RequestError:
    return RequestError(400, f"{name} must be {expected}", name)


def whole(body: Mapping[str, Any], name: str, default: int | None, least: int, most: int | None = None) -> int | None:
    """An integer in [least, most]; the default where it is null or left out."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        raise bad(name, f"a whole number from {least} to {most}" if most is not None else f"a whole number >= {least}")
    return value


def number(body: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    """A finite number in [least, most]; the default where it is null or left out."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most or not math.isfinite(value):
        raise bad(name, f"a number from {least:g} to {most:g}")
    return float(value)


def flag(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise bad(name, "true or false")
    return value


def text(value: Any, name: str) -> str:
    """A string that UTF-8 can hold: JSON may spell half of a surrogate pair."""
    if not isinstance(value, str):
        raise bad(name, "a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise bad(name, "Unicode text; it holds half of a surrogate pair") from None
    return value


def texts(value: Any, name: str, most: int, longest: int) -> tuple[str, ...]:
    """Null, a string, or a list of at most so many, none of them empty or longer than so many characters."""
    if value is None:
        return ()
    several = value if isinstance(value, list) else [value]
    if len(several) > most:
        raise bad(name, f"a string or at most {most} of them")
    found = tuple(text(one, name) for one in several)
    if any(not 0 < len(one) <= longest for one in found):
        raise bad(name, f"text of 1 to {longest} characters")
    return found


def token_biases(value: Any, name: str, vocab_size: int) -> dict[int, float]:
    """{"token id": bias}, ids in the vocabulary and biases from -100 to 100."""
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > 1024:
        raise bad(name, "an object of at most 1024 token ids with their biases")
    found = {}
    for key in value:
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise RequestError(400, f"{name} names the token {key[:40]!r}; ids are 0 to {vocab_size - 1}", name)
        found[int(key)] = number(value, key, 0.0, -100, 100)
    return found
