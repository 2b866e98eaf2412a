"""Runs that an older version began go on in this one: the same numbers, whatever has been renamed since.

before_renames/ holds two runs stopped at step 4 of 8, with the metrics that the older version wrote to the end.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import treadle
from tests.conftest import make_text
from tests.conftest import treadle as command
from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.monitor.sinks import CsvSink
from treadle.recipe import compose, target_layer
from treadle.settings import dump_toml

OLDER = Path(__file__).parent / "before_renames"
RENAMED = {"symbols_per_chunk_0": "tokens_per_chunk_0"}  # statistics in metrics.jsonl, as they were and as they are
MEASURED = {"seconds", "tokens_per_second", "memory_gb", "data_wait"}  # differs from run to run
# Whose processor it is decides which matrix products torch's library picks, also where both have AVX2: the sums of an AMD
# machine differ from an Intel one's by 1e-7 after four steps, so no last bits are asked for.
CLOSE = 1e-5


@pytest.fixture(params=["transformer", "hnet"])
def older(request: pytest.FixtureRequest, in_folder: Path) -> Path:
    """A copy of an older run, beside the text that it was started on."""
    (in_folder / "story.txt").write_text(make_text(120), encoding="utf-8")
    return Path(shutil.copytree(OLDER / request.param, in_folder / request.param))


def rows(path: Path) -> list[dict[str, Any]]:
    """Rows by the names of today, without what is measured anew in each run."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{RENAMED.get(key, key): value for key, value in row.items() if key not in MEASURED} for row in found]


def test_a_run_goes_on(older: Path) -> None:
    out = command("train", "story.txt", "--output_dir", older.name, "--device", "cpu", cwd=older.parent)
    assert out.returncode == 0 and "Resumed from step 4" in out.stdout, out.stdout + out.stderr
    wanted, found = rows(older / "expected.jsonl"), rows(older / "metrics.jsonl")
    assert [row["step"] for row in found] == [row["step"] for row in wanted] == [1, 3, 4, 6, 8, 8]
    assert [row.pop("split", None) for row in found] == [row.pop("split", None) for row in wanted]
    found = [{name: new.get(name) for name in old} for new, old in zip(found, wanted)]
    assert found == [pytest.approx(row, rel=CLOSE) for row in wanted]


def test_a_renamed_column_of_the_csv_goes_on(tmp_path: Path) -> None:
    (tmp_path / "training_log.csv").write_text("step,loss,symbols_per_chunk_0,symbols_per_chunk_1\n4,5.5,2.5,4.0\n")
    sink = CsvSink(tmp_path, 4, "run", "project", {})
    sink.train({"step": 6, "loss": 5.4, "tokens_per_chunk_0": 2.0, "tokens_per_chunk_1": 3.0})
    text = (tmp_path / "training_log.csv").read_text()
    assert text.splitlines() == ["step,loss,tokens_per_chunk_0,tokens_per_chunk_1", "4,5.5,2.5,4.0", "6,5.4,2.0,3.0"]


def test_the_model_loads(older: Path) -> None:
    model, tokenizer = treadle.load(str(older))
    ids = torch.as_tensor(tokenizer.encode("She had").astype("int64"))[None]
    assert model(Batch.from_ids(ids)).logits.shape == (1, 7, 256)


def test_a_key_goes_by_its_older_name_too(tmp_path: Path) -> None:
    """From a config.toml, from Python and beside its own name."""
    shape = {"hidden_sizes": [16, 16], "num_blocks": [[1, 0, 1], [1]], "attention_heads": 2}
    mixers = ["attention", "hgrn_bit"]
    (tmp_path / "config.toml").write_text(dump_toml({"model": {"arch": "hnet", **shape, "mixers": mixers}}))
    composed = compose([target_layer(str(tmp_path / "config.toml"))])
    assert composed.model["token_mixers"] == mixers and "mixers" not in composed.model
    model = treadle.build("hnet", mixers=mixers, **shape)
    assert model.config.token_mixers == mixers  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"model\.token_mixers is given twice, also as mixers"):
        treadle.build("hnet", mixers=mixers, token_mixers=mixers, **shape)
