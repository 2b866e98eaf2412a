"""What stands in a bundle for parts of treadle that need more than torch: `Settings` for the checked keys of a model (they are
checked when it is exported), the table of token mixers, and the error of bad input."""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """Input that this model cannot take; the message says what to do."""


class Settings:
    """The keys of a model as config.json has them."""

    def __init__(self, **keys: Any) -> None:
        for name, value in keys.items():
            setattr(self, name, value)


class MixerTable(dict[str, Any]):
    """The token mixers of this model's blocks by their names, which config.json has in full."""

    def canonical(self, name: str) -> str:
        """The name, which is spelled here as in the configuration."""
        return name
