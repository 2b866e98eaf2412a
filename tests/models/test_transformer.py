"""The dense transformer: what its presets promise."""

from __future__ import annotations

from tests.conftest import make_text


def test_presets_say_the_truth() -> None:
    from treadle.models.base import parameter_count
    from treadle.models.transformer import Transformer, TransformerConfig

    sizes = TransformerConfig.preset_sizes()
    assert sizes.keys() == TransformerConfig.presets().keys()
    for name, size in sizes.items():
        count = parameter_count(Transformer, TransformerConfig.with_preset(name))
        assert abs(count / size - 1) < 0.05, f"{name} has {count}"
    assert make_text(1)
