"""A user with a list of trusted code of their own, and files of code that tell when they ran."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from treadle import trusted_code

MODEL = "from treadle.models.transformer import Transformer\n\n\nclass Mine(Transformer):\n    arch = 'mine'\n"


@pytest.fixture()
def new_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], None]:
    """Called, it makes this process forget what it trusted and loaded, as a new one would; the user's list stays."""
    monkeypatch.setenv("TREADLE_CONFIG_HOME", str(tmp_path / "home"))

    def forget() -> None:
        for name, empty in (("_allowed", set()), ("_kept", set()), ("_loaded", {}), ("_modules", {}), ("_places", {})):
            monkeypatch.setattr(trusted_code, name, empty)

    forget()
    return forget


class Code:
    """A .py file that leaves a mark when it is executed."""

    def __init__(self, path: Path, text: str = MODEL) -> None:
        self.path, self.mark = path, path.with_suffix(".ran")
        self.write(text)

    def write(self, text: str) -> None:
        self.path.write_text(f"import pathlib\npathlib.Path({str(self.mark)!r}).touch()\n{text}")

    @property
    def ran(self) -> bool:
        return self.mark.exists()


@pytest.fixture()
def code(new_process: Callable[[], None], tmp_path: Path) -> Code:
    folder = tmp_path / "sent"
    folder.mkdir()
    return Code(folder / "evil.py")
