"""The map itself, in Python integers: what every fast path is checked against and replayed with when it overflows.

For odd q and odd c the map sends an even n to n / 2 and an odd n to q n + c; the shortcut map T takes an odd n to
(q n + c) / 2 at once. Collatz's own is q = 3, c = 1 (Lagarias 1985, Amer. Math. Monthly 92).
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from treadle.errors import ConfigError

LARGEST_EXPONENT = 100_000  # 2^100000 has 30,103 digits; more is a typing mistake, and 2^(10^9) would take the memory


@dataclass(frozen=True)
class Map:
    """n -> n / 2 for even n, q n + c for odd n."""

    q: int = 3
    c: int = 1

    def __post_init__(self) -> None:
        if self.q < 1 or self.q % 2 == 0 or self.c % 2 == 0:
            raise ConfigError(f"a map q x + c needs odd q >= 1 and odd c, so that q n + c is even; this one is {self}")

    def __str__(self) -> str:
        return f"{self.q}x{self.c:+d}"

    @staticmethod
    def parse(text: str) -> Map:
        """ "3x+1", "3n-1", "5 x + 7" as a Map."""
        match = re.fullmatch(r"\s*(\d+)\s*\*?\s*[xn]\s*([+-])\s*(\d+)\s*", text.lower().replace("\N{MINUS SIGN}", "-"))
        if match is None:
            raise ConfigError(f"{text!r} is no map; write it as 3x+1, 3x-1 or 5x+7")
        return Map(int(match[1]), int(match[2] + match[3]))

    def step(self, n: int) -> int:
        """One standard step."""
        return self.q * n + self.c if n & 1 else n >> 1

    def shortcut(self, n: int) -> int:
        """One shortcut step T: the step after an odd number, always a halving, is taken with it."""
        return (self.q * n + self.c) >> 1 if n & 1 else n >> 1


COLLATZ = Map()


def number(text: str | int, what: str = "a number") -> int:
    """An exact integer as people write it: 123, 1_000, "1,000", 10^8, 2^68+5, 2**68 - 1, 3*2^40, 1e12."""
    if isinstance(text, int):
        return text
    plain = re.sub(r"(?<=\d)[_,](?=\d)", "", text.strip()).replace("^", "**").replace("\N{MINUS SIGN}", "-")
    plain = re.sub(r"\b(\d+)(?:\.(\d+))?[eE]\+?(\d{1,5})\b", _scientific, plain)
    try:
        return _value(ast.parse(plain, mode="eval").body)
    except (ValueError, SyntaxError, RecursionError) as problem:
        raise ConfigError(f"{text!r} is not {what}; write an integer, as in 1000000, 10^8, 2^68 or 2^68+2^20") from problem


def _scientific(match: re.Match[str]) -> str:
    whole, fraction, exponent = match[1], match[2] or "", int(match[3])
    if exponent < len(fraction) or exponent > LARGEST_EXPONENT:
        raise ConfigError(f"{match[0]} is not an integer that this can hold")
    return str(int(whole + fraction + "0" * (exponent - len(fraction))))


def _value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Pow) and right >= 0 and right * max(1, abs(left).bit_length()) <= LARGEST_EXPONENT:
            return left**right
    raise ValueError(ast.dump(node))


def spelled(n: int) -> str:
    """A number as people write it: 2^68, 2^68+2^36, 1,000,000."""
    for part, joint in ((0, ""), (n & -n if n > 0 else 0, "+")):
        top = n - part
        if top > 0xFFFF and top & (top - 1) == 0:
            low = "" if not part else f"2^{part.bit_length() - 1}" if part > 0xFFFF else f"{part:,}"
            return f"2^{top.bit_length() - 1}{joint}{low}"
    return f"{n:,}"


def trajectory(n: int, map: Map = COLLATZ, most: int = 10_000_000) -> list[int]:
    """n and what follows it, standard steps, up to the first 1 (for other maps: the first number seen before)."""
    found, seen = [n], {n}
    while n != 1 or map != COLLATZ:
        n = map.step(n)
        if n in seen:
            break
        if len(found) >= most:
            raise ConfigError(f"{found[0]} has not come back after {most:,} steps of {map}")
        found.append(n)
        seen.add(n)
    return found


def delay(n: int) -> int:
    """Standard steps from n >= 1 to 1 (OEIS A006577)."""
    _positive(n)
    steps = 0
    while n != 1:
        if n & 1:
            n = 3 * n + 1
            steps += 1
        halvings = (n & -n).bit_length() - 1
        n >>= halvings
        steps += halvings
    return steps


def shortcut_delay(n: int) -> int:
    """Shortcut steps from n >= 1 to 1 (OEIS A006666)."""
    _positive(n)
    steps = 0
    while n != 1:
        n = (3 * n + 1) >> 1 if n & 1 else n >> 1
        steps += 1
    return steps


def maximum(n: int) -> int:
    """The largest number on the way from n >= 1 to 1, standard steps (OEIS A025586)."""
    _positive(n)
    most = n
    while n != 1:
        if n & 1:
            n = 3 * n + 1
            most = max(most, n)
        n >>= (n & -n).bit_length() - 1
    return most


def parities(n: int, count: int, shortcut: bool = True) -> list[int]:
    """The parities (1 = odd) of n and what follows it, `count` of them; the trajectory goes round 1, 4, 2 after 1."""
    found = []
    for _ in range(count):
        found.append(n & 1)
        n = COLLATZ.shortcut(n) if shortcut else COLLATZ.step(n)
    return found


def _positive(n: int) -> None:
    if n < 1:
        raise ConfigError(f"trajectories to 1 begin at a positive integer, not {n}")
