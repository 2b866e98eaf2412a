"""How many processes there are. One, in this version: several are refused rather than trained apart by accident."""

from __future__ import annotations

import os

from treadle.errors import ConfigError


def refuse_many() -> None:
    """ConfigError when a launcher started several processes."""
    world = int(os.environ.get("WORLD_SIZE") or 1)
    if world > 1:
        raise ConfigError(
            f"{world} processes were started, and this version trains in one; start `treadle train` alone"
        )
