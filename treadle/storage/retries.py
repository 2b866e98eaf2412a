"""Requests over a network that are tried again when they fail for a passing reason."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from treadle.errors import DataError, TreadleError

T = TypeVar("T")

ATTEMPTS = 6
FIRST_WAIT = 0.5  # seconds, doubled each time: .5, 1, 2, 4, 8; some 15 s in all, beside what the library behind it waits
LASTING = (NotImplementedError, ImportError, TypeError, IsADirectoryError, NotADirectoryError)


class Gone(DataError):
    """There is nothing at a URL."""


class Unreachable(DataError):
    """What a URL names cannot be reached for the moment."""


def attempt(what: str, work: Callable[[], T]) -> T:
    """What `work` returns. what: said in the error, "reading s3://bucket/file".

    Raises Gone where there is nothing, DataError for a lasting reason (no access) at once, Unreachable for any other after ATTEMPTS.
    """
    for number in range(ATTEMPTS):
        try:
            return work()
        except TreadleError:
            raise
        except Exception as problem:  # each library behind fsspec has errors of its own
            if isinstance(problem, FileNotFoundError) and not _no_answer(problem):
                raise Gone(f"{what}: there is nothing there (any more)") from None
            if isinstance(problem, PermissionError) or "Credential" in type(problem).__name__:
                raise DataError(f"{what}: {_said(problem)}; credentials are taken from the environment (docs/object_storage.md)") from None
            if isinstance(problem, LASTING) or "Validation" in type(problem).__name__:
                raise DataError(f"{what}: {_said(problem)}") from None
            if number + 1 == ATTEMPTS:
                raise Unreachable(f"{what}: {_said(problem)}, {ATTEMPTS} times in a row; the same command continues when it can be "
                                "reached again") from None  # fmt: skip
        time.sleep(FIRST_WAIT * 2**number * random.uniform(0.5, 1))  # many processes do not come back at once
    raise AssertionError


def _no_answer(problem: FileNotFoundError) -> bool:
    """fsspec's http says of a server that does not answer that the file is not there."""
    return isinstance(problem.__cause__, (OSError, TimeoutError)) and not isinstance(problem.__cause__, FileNotFoundError)


def _said(problem: Exception) -> str:
    if isinstance(problem, FileNotFoundError) and isinstance(problem.__cause__, Exception):
        problem = problem.__cause__
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}{': ' + text[:300] if text else ''}"
