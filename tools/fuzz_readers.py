"""Coverage-guided fuzzing of everything that reads a file from elsewhere. Needs `pip install atheris`.

    python tools/fuzz_readers.py -max_total_time=60

Each input goes to one reader, chosen by its first byte. A reader may return, yield Bad records, or raise a TreadleError;
anything else is a finding.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["treadle"]):
    import numpy as np

    from treadle.checkpoint.reader import Checkpoint
    from treadle.checkpoint.tensors import parse_tensors
    from treadle.data.shards import TokenSet
    from treadle.data.sources import Bad, open_source
    from treadle.errors import TreadleError
    from treadle.settings import load_table
    from treadle.text.base import Tokenizer

FOLDER = Path(tempfile.mkdtemp(prefix="treadle-fuzz-"))


def read_documents(data: bytes, suffix: str, separator: str | None = None) -> None:
    path = FOLDER / f"input{suffix}"
    path.write_bytes(data)
    source = open_source(path, separator=separator)
    for piece in source.pieces():
        for document in source.read(piece):
            assert isinstance(document, (str, Bad, np.ndarray))
            if isinstance(document, str):
                document.encode("utf-8")


def read_manifest(data: bytes) -> None:
    folder = FOLDER / "step-00000001"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(data)
    Checkpoint(folder).verify()


def read_shards(data: bytes) -> None:
    folder = FOLDER / "shards"
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_bytes(data)
    (folder / "shard-00000.bin").write_bytes(data)
    (folder / "shard-00000.idx").write_bytes(data[:64])
    TokenSet.load(folder)


def read_tokenizer(data: bytes) -> None:
    folder = FOLDER / "tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "treadle_tokenizer.json").write_bytes(data)
    Tokenizer.load(folder)


def read_recipe(data: bytes, suffix: str) -> None:
    path = FOLDER / f"recipe{suffix}"
    path.write_bytes(data)
    load_table(path)


READERS = [
    lambda data: read_documents(data, ".jsonl"),
    lambda data: read_documents(data, ".txt"),
    lambda data: read_documents(data, ".txt", separator="END"),
    lambda data: read_documents(data, ".bin"),
    lambda data: parse_tensors(np.frombuffer(data, dtype=np.uint8), "input"),
    read_manifest,
    read_shards,
    read_tokenizer,
    lambda data: read_recipe(data, ".toml"),
    lambda data: read_recipe(data, ".yaml"),
    lambda data: read_recipe(data, ".json"),
]


def one_input(data: bytes) -> None:
    if not data:
        return
    try:
        READERS[data[0] % len(READERS)](data[1:])
    except TreadleError:
        pass


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
