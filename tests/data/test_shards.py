"""`treadle data prepare --shard I/N`: the pieces of several processes joined are the whole."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import make_text, treadle
from treadle.data import summary
from treadle.data.prepare import open_prepared
from treadle.errors import ConfigError, DataError


@pytest.fixture()
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("treadle.data.sources.Source.piece_bytes", 1000)  # so that each file is pieces of its own
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in
                                                        make_text(20, number).splitlines() if line))  # fmt: skip
    return folder


def prepare(texts: Path, output: Path, shard: str | None = None, **keys: object) -> str:
    wanted = summary.settings(str(texts), **keys)
    if shard is None:
        return "\n".join(summary.prepare_text(wanted, "byte", 256, str(output), False, lambda text: None))
    return "\n".join(summary.prepare_part(wanted, "byte", 256, str(output), shard, lambda text: None))


def pieces(folder: Path) -> list[int]:
    return sorted(int(path.stem[6:]) for path in folder.glob("piece-*.json"))


def test_shards_joined_are_the_whole(texts: Path, tmp_path: Path) -> None:
    prepare(texts, tmp_path / "whole")
    with ThreadPoolExecutor(3) as pool:  # at once, as on three machines
        said = list(pool.map(lambda n: prepare(texts, tmp_path / "parts", f"{n}/3"), range(3)))
    assert all("without --shard" in text for text in said)
    assert not (tmp_path / "parts" / "train" / "dataset.json").exists()
    assert "prepared:" in prepare(texts, tmp_path / "parts")
    whole, parts = open_prepared(tmp_path / "whole"), open_prepared(tmp_path / "parts")
    for split in ("train", "validation"):
        assert whole[split].fingerprint == parts[split].fingerprint
    trained = treadle("check", "--data.path", tmp_path / "parts", "--hidden_size", 16, "--num_layers", 1, "--num_heads", 1)
    assert trained.returncode == 0, trained.stderr


def test_a_shard_goes_on_where_it_stopped(texts: Path, tmp_path: Path) -> None:
    prepare(texts, tmp_path / "p", "0/2")
    done = pieces(tmp_path / "p")
    assert len(done) >= 3 and all(number % 2 == 0 for number in done)
    lost, kept = (tmp_path / "p" / f"piece-{done[n]:05d}.json" for n in (1, 0))
    lost.unlink()
    before = kept.stat().st_mtime_ns
    prepare(texts, tmp_path / "p", "0/2")
    assert pieces(tmp_path / "p") == done and kept.stat().st_mtime_ns == before
    prepare(texts, tmp_path / "p")  # joining makes what is missing itself
    prepare(texts, tmp_path / "whole")
    assert open_prepared(tmp_path / "p")["train"].fingerprint == open_prepared(tmp_path / "whole")["train"].fingerprint


def test_a_damaged_piece_is_named_and_made_again(texts: Path, tmp_path: Path) -> None:
    for shard in ("0/2", "1/2"):
        prepare(texts, tmp_path / "p", shard)
    path = tmp_path / "p" / "train" / "shard-00003.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-00003.bin is not what piece 3 wrote"):
        prepare(texts, tmp_path / "p")
    assert "prepared:" in prepare(texts, tmp_path / "p")
    prepare(texts, tmp_path / "whole")
    assert open_prepared(tmp_path / "p")["train"].fingerprint == open_prepared(tmp_path / "whole")["train"].fingerprint


def test_other_options_never_delete_the_work_of_others(texts: Path, tmp_path: Path) -> None:
    prepare(texts, tmp_path / "p", "0/2")
    before = pieces(tmp_path / "p")
    for shard in ("1/2", None):
        with pytest.raises(ConfigError, match="other text, or made with another tokenizer"):
            prepare(texts, tmp_path / "p", shard, min_length=5)
    refused = treadle("data", "prepare", texts, "--output", tmp_path / "p", "--shard", "1/2", "--fresh")
    assert refused.returncode == 2 and "--fresh would delete" in refused.stderr
    assert pieces(tmp_path / "p") == before


@pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "-1/2", "1/0"])
def test_bad_shards(texts: Path, tmp_path: Path, shard: str) -> None:
    with pytest.raises(ConfigError, match="write I/N"):
        prepare(texts, tmp_path / "p", shard)


def test_the_command(texts: Path, tmp_path: Path) -> None:
    for more, said in ((("--shard", "0/1"), "all are there"), ((), "prepared:")):
        out = treadle("data", "prepare", texts, "--output", tmp_path / "p", "--tokenizer", "byte", *more)
        assert out.returncode == 0 and said in out.stdout, out.stderr
