"""A stream takes as much memory for a source of any size."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from treadle.data.base import BatchPlan, Dataset
from treadle.ops.memory import peak_resident_bytes

data = Dataset.load(sys.argv[1], tokenizer="byte", seq_len=1024, streaming=True, validation_fraction=0.0)
for step, (batches, position) in enumerate(data.batches(data.start, BatchPlan(0, 64, workers=int(sys.argv[2])))):
    if step == 700:  # 45 million tokens: every lane has had several blocks
        break
print(peak_resident_bytes())
"""


def peak(path: Path, workers: int) -> int:
    out = subprocess.run([sys.executable, "-c", PROGRAM, str(path), str(workers)], capture_output=True, text=True, timeout=250,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert out.returncode == 0, out.stderr
    return int(out.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_ten_gigabytes_take_the_memory_of_half_a_gigabyte(tmp_path: Path, workers: int) -> None:
    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefghij", k=dice.randint(2, 9))) for _ in range(5000)]
    lines = "".join(json.dumps({"text": " ".join(dice.choices(words, k=dice.randint(20, 400)))}) + "\n" for _ in range(3000)).encode()
    found, path = [], tmp_path / "large.jsonl"
    with path.open("wb") as out:
        for size in (500_000_000, 10_000_000_000):
            while out.tell() < size:
                out.write(lines)
            out.flush()
            found.append(peak(path, workers))
    path.unlink()
    assert found[1] < 1.1 * found[0], found
