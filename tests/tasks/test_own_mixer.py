"""The token mixer of docs/extending.md, from its file to a comparison, and what is said of one that lacks something. (Its own check runs with
the document's other blocks: tests/house/test_documents.py.)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import treadle
from tests.conftest import make_text
from tests.conftest import treadle as command
from treadle.errors import ConfigError
from treadle.reporting.compare import compare

DOCUMENT = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
MIXER = re.search(r"`running_mean\.py`.*?\n```python\n(.*?)```", DOCUMENT, flags=re.S)
SHORT = ("--max_steps", "4", "--hidden_size", "32", "--num_layers", "2", "--batch_size", "2", "--seq_len", "32", "--eval_rows", "4", "--vocab_size", "300",
         "--seq_len_schedule", "none")  # fmt: skip


@pytest.fixture()
def mixer(in_folder: Path) -> Path:
    assert MIXER is not None
    (in_folder / "running_mean.py").write_text(MIXER[1])
    (in_folder / "story.txt").write_text(make_text(60))
    return in_folder / "running_mean.py"


def test_it_trains_writes_and_compares(mixer: Path) -> None:
    for name, types in (("mean", "running_mean.py:RunningMean"), ("hybrid", "running_mean.py:RunningMean,full_attention")):
        out = command("train", "story.txt", "--layer_types", types, "--run_name", name, *SHORT, cwd=mixer.parent)
        assert out.returncode == 0, out.stdout + out.stderr
    out = command("generate", "runs/mean", "--prompt", "The ", "--max-new-tokens", "5", cwd=mixer.parent)
    assert out.returncode == 0, out.stdout + out.stderr
    table = compare(["runs/mean", "runs/hybrid"])
    assert all(row["flops_per_byte"] > 0 and row["state_bytes"] > 0 for row in table)


@pytest.mark.parametrize(
    ("taken", "says"),
    [("def from_config", r"lacks from_config\(config, layer\);"), ("def flops", r"lacks flops\(length\);"),
     ("def new_state", r"lacks new_state\(rows, max_len, device, dtype\);")],
)
def test_what_it_lacks_is_said_when_it_is_named(mixer: Path, taken: str, says: str) -> None:
    mixer.write_text(mixer.read_text().replace(taken, taken + "_"))
    with pytest.raises(ConfigError, match=says):
        treadle.build(layer_types=["running_mean.py:RunningMean"], trust_code=["running_mean.py"], hidden_size=32, num_layers=2, num_heads=2)


def test_a_forward_without_context_is_refused(mixer: Path) -> None:
    mixer.write_text(mixer.read_text().replace("def forward(self, x, context, state=None)", "def forward(self, x)"))
    with pytest.raises(ConfigError, match=r"lacks forward\(x, context, state=None\)"):
        treadle.build(layer_types=["running_mean.py:RunningMean"], trust_code=["running_mean.py"], hidden_size=32, num_layers=2, num_heads=2)


class Headless(treadle.Model):
    Config = treadle.LanguageModelConfig

    def __init__(self, config: treadle.LanguageModelConfig) -> None:
        super().__init__()
        self.config = config


def test_a_model_that_would_decode_has_a_state() -> None:
    """Said before anything is trained, not at the first sample."""
    with pytest.raises(ConfigError, match=r"no new_state\(.*capabilities = treadle.Capabilities\(decodes=False\)"):
        treadle.build(Headless, vocab_size=10)
