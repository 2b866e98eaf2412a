"""What compiled code of the verifier begins with: how it is compiled and kept, and two instructions that numba lacks.

Compiled functions that call each other stay in one file: numba's cache of a file does not notice changes in another.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from treadle.files import cache_root


def _keeps() -> bool:
    """Whether compiled code can be kept in treadle's cache; numba's own choice, beside the package, may not be writable."""
    folder = Path(os.environ.get("NUMBA_CACHE_DIR") or cache_root(None) / "numba")
    setattr(numba.config, "CACHE_DIR", str(folder))  # noqa: B010  its module declares no names
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


compiled: Any = numba.njit(nogil=True, cache=_keeps(), error_model="numpy")
exact: Any = intrinsic
U = np.uint64


@exact
def trailing_zeros(context: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return numba.uint64(numba.uint64), build


@exact
def high_product(context: Any, left: Any, right: Any) -> Any:
    """The upper 64 bits of a product of two 64-bit numbers."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(builder.zext(arguments[0], wide), builder.zext(arguments[1], wide))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return numba.uint64(numba.uint64, numba.uint64), build
