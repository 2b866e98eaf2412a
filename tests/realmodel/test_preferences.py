"""DPO with adapters on the real model: a dozen pairs move it towards the chosen answers, held-out ones included."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import treadle


def test_a_dozen_pairs_move_the_real_model(folder: Path, tmp_path: Path) -> None:
    keys = {"objective": "dpo", "lora_rank": 8, "learning_rate": 1e-3, "packing": "none", "seq_len": 320, "batch_size": 2, "max_steps": 6,
            "warmup_steps": 1, "logging_steps": 1, "eval_steps": 6, "eval_rows": 6, "validation_fraction": 0.2, "sample_tokens": 0}  # fmt: skip
    given = [word for name, value in keys.items() for word in (f"--{name}", value)]
    out = treadle("train", "preferences", "--from", folder, "--output_dir", tmp_path / "r", *given, timeout=1800)
    assert out.returncode == 0, out.stderr
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    # Adapters start at 0 and change nothing, so the first loss is log 2.
    assert abs(rows[0]["loss"] - 0.693147) < 1e-5 and rows[0]["reward_margin"] == 0
    (held,) = [row for row in rows if "split" in row]
    print(f"held-out loss {held['loss']:.4f}, margin {held['reward_margin']:.4f}, accuracy {held['accuracy']:.2f}")
    assert held["loss"] < 0.66 and held["reward_margin"] > 0.05 and held["accuracy"] >= 0.75
