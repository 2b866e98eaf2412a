"""Writing to a terminal what others have made: text of a model, of data, of file names, of errors that quote them.

A terminal obeys what it is sent: an escape sequence sets its title, rewrites lines above, or answers as if typed. So whatever
goes to a terminal passes through `write` (or `fit`), which shows such characters instead of sending them. A file or a pipe gets
the exact text.
"""

from __future__ import annotations

import re
import shutil
import sys
from typing import TextIO

# Control characters except newline and tab; marks that turn the direction of text around them, which makes a line read as what
# it is not; other ends of lines; and halves of characters, which cannot be written at all.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """`text` with every character that would act on a terminal as its escape: ESC becomes \\x1b, an override \\u202e."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except (ValueError, AttributeError):  # closed, or only something to write to
        return False


def columns(stream: TextIO | None) -> int | None:
    """Characters of a line of the terminal that `stream` is; None for a pipe or a file."""
    return shutil.get_terminal_size().columns if is_terminal(stream) else None


def fit(text: str, stream: TextIO | None) -> str:
    """`text` as `stream` may have it: visible for a terminal, exact for the rest."""
    return visible(text) if is_terminal(stream) else text


def write(text: object, stream: TextIO | None = None, end: str = "\n", exact: bool = False) -> None:
    """Writes and flushes, by default a line to standard output. exact: for text that holds treadle's own colours, and passed
    what is not its own through `fit`."""
    stream = stream or sys.stdout
    if stream is not None:  # a process without one
        stream.write((str(text) if exact else fit(str(text), stream)) + end)
        stream.flush()
