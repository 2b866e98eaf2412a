"""Data behind URLs: the same rows as from local files, whatever the network does, in bounded space, and no secret written."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import random
import shutil
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.test_streaming import ids, json_lines, stream, take, texts
from tests.s3 import SECRET, Proxy
from treadle.data.base import BatchPlan, Dataset
from treadle.data.prepare import is_prepared
from treadle.data.sources import open_source
from treadle.errors import ConfigError, DataError, InputError, MissingExtra
from treadle.storage import filesystems, retries
from treadle.storage.arrays import mapped
from treadle.storage.cache import PART_BYTES, PartCache
from treadle.storage.remote import RemotePath, local_copy, path_of, refuse_secrets


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.02)
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "cache"))
    filesystems._handles().clear()


def put(folder: Path, name: str) -> str:
    """Copies a folder to s3://bucket/NAME; returns the URL."""
    import fsspec

    url = f"s3://bucket/{name}"
    system, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    if system.exists(path):
        system.rm(path, recursive=True)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            system.put_file(str(file), f"{path}/{file.relative_to(folder)}")
    return url


def zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    out = io.BytesIO()
    for at in range(0, len(data), 50_000):  # several frames
        out.write(zstandard.ZstdCompressor().compress(data[at : at + 50_000]))
    return out.getvalue()


def parquet(documents: list[str]) -> bytes:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    pq.write_table(pa.table({"text": documents}), out, row_group_size=500)
    return out.getvalue()


FORMATS = {
    "jsonl": lambda documents: json_lines(documents),
    "jsonl.gz": lambda documents: gzip.compress(json_lines(documents)),
    "jsonl.zst": lambda documents: zstd(json_lines(documents)),
    "txt": lambda documents: "".join(f"{text.replace(chr(10), ' ')}\n" for text in documents).encode(),
    "csv": lambda documents: ("text\n" + "".join(f'"{text}"\n' for text in documents)).encode(),
    "parquet": parquet,
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_remote_folder_gives_the_rows_of_a_local_one(server: Proxy, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for part in range(2):
        (folder / f"{part}.{kind}").write_bytes(FORMATS[kind](texts()[part::2]))
    url = put(folder, f"formats/{kind}")
    server.breaks("GET /bucket/formats", "503", "cut", "slow")
    expected, _ = take(stream(str(folder)), 12)
    found, positions = take(stream(url), 12)
    assert ids(found) == ids(expected)
    assert len(server.broken) == 3 and not server.faults
    again, _ = take(stream(url), 4, position=positions[7])
    assert ids(again) == ids(expected)[8:]


def test_reads_in_ranges_keeps_them_and_stays_within_its_space(server: Proxy, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(json_lines(texts(30_000)))
    size = (folder / "a.jsonl").stat().st_size
    url = put(folder, "ranges") + "/a.jsonl"
    server.breaks("")
    source = open_source(url)
    source.piece_bytes = 1 << 18
    pieces = source.pieces()
    assert len(pieces) == -(-size // (1 << 18)) and server.sent == 0, "a file is cut without being read"
    text = list(source.read(pieces[5]))
    assert len([line for line in server.seen if line.startswith("GET")]) == 1, "a piece is one request"
    assert server.sent <= (1 << 18) + 3 * PART_BYTES
    before = server.sent
    assert list(open_source(url).read(pieces[5])) == text and server.sent == before, "what is kept is not fetched again"
    assert [t for piece in pieces for t in source.read(piece)] == texts(30_000)
    (kept,) = (tmp_path / "cache" / "remote").glob("*/*")
    for part in kept.iterdir():  # damage on the disk
        data = bytearray(part.read_bytes())
        data[-1] ^= 1
        part.write_bytes(data)
    assert list(source.read(pieces[5])) == text
    small = PartCache(tmp_path / "small", 8 * PART_BYTES)
    for _ in range(2):
        bounded = open_source(url, cache=small)
        assert list(itertools.chain.from_iterable(bounded.read(piece) for piece in pieces)) == texts(30_000)
        assert 0 < sum(f.stat().st_size for f in (tmp_path / "small").rglob("*") if f.is_file()) <= 8 * PART_BYTES
    nothing = open_source(url, cache=PartCache(tmp_path / "nothing", 0))
    assert list(nothing.read(pieces[5])) == text and not (tmp_path / "nothing").exists()


def test_a_lost_object_is_named_and_the_same_position_goes_on_when_it_is_back(server: Proxy, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(json_lines(texts()))
    url = put(folder, "lost")
    expected, _ = take(stream(url, remote_cache_gb=0.0), 8)
    data = stream(url, remote_cache_gb=0.0)
    made = data.batches(data.start, BatchPlan(3, 16))
    first = [next(made) for _ in range(3)]
    import fsspec

    fsspec.core.url_to_fs(url, use_listings_cache=False)[0].rm("bucket/lost/a.jsonl")
    with pytest.raises(DataError, match=r"s3://bucket/lost/a\.jsonl: there is nothing there"):
        for _ in made:
            pass
    put(folder, "lost")
    found, _ = take(stream(url, remote_cache_gb=0.0), 5, position=first[-1][1])
    assert ids([batches for batches, _ in first]) + ids(found) == ids(expected)


def test_an_object_that_changes_is_never_mixed(server: Proxy, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(json_lines(texts()))
    url = put(folder, "changed")
    data = stream(url, remote_cache_gb=0.0)
    made = data.batches(data.start, BatchPlan(3, 16))
    next(made)
    (folder / "a.jsonl").write_bytes(json_lines(texts()[::-1]))  # of the same size
    put(folder, "changed")
    with pytest.raises(DataError, match=r"a\.jsonl was changed while it was read \(version"):
        for _ in made:
            pass
    other = stream(url)
    assert other.fingerprint() != data.fingerprint()
    assert "a.jsonl has other content" in other.difference(data.fingerprint())


def test_a_server_that_stays_away_and_one_that_refuses(server: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "ATTEMPTS", 2)  # s3fs tries several times too, for 8 s
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(json_lines(texts(50)))
    file = RemotePath(put(tmp_path / "texts", "away") + "/a.jsonl")
    file.state()
    server.breaks("GET /bucket/away", *["503"] * 100)
    with pytest.raises(DataError, match=r"reading s3://bucket/away/a\.jsonl: .*2 times in a row; the same command continues"):
        file.read_range(0, 10)
    server.breaks("")
    calls: list[int] = []

    def refused() -> None:
        calls.append(1)
        raise PermissionError("Access Denied")

    with pytest.raises(DataError, match=r"Access Denied; credentials are taken from the environment"):
        retries.attempt("reading x", refused)
    assert len(calls) == 1
    with pytest.raises(InputError, match=r"s3://bucket/nowhere does not exist"):
        open_source("s3://bucket/nowhere")


def test_prepared_shards_are_read_in_place(server: Proxy, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts(20_000)))
    made: Any = Dataset.load(tmp_path / "a.jsonl", tokenizer="bpe", seq_len=128, packing="best_fit")
    folder = made.sets[0].folder.parent
    url = put(folder, "prepared")
    assert is_prepared(url) and not is_prepared("s3://bucket/none")
    server.breaks("GET /bucket/prepared/train/shard", "cut", "503")
    remote: Any = Dataset.load(url, seq_len=128, packing="best_fit")
    assert remote.fingerprint() == made.fingerprint()
    assert remote.tokenizer.fingerprint() == made.tokenizer.fingerprint()
    plan = BatchPlan(3, 16)
    for (expected, _), (found, _) in itertools.islice(zip(made.batches(0, plan), remote.batches(0, plan)), 5):
        assert [b.input_ids.tolist() for b in found] == [b.input_ids.tolist() for b in expected]
        assert [b.labels.tolist() for b in found] == [b.labels.tolist() for b in expected]
    assert len(server.broken) == 2
    remote.sets[0].verify()
    with np.testing.assert_raises(IndexError):
        remote.sets[0].shards[0].ids[10**9]
    import fsspec

    system = fsspec.core.url_to_fs(url, use_listings_cache=False)[0]
    place = f"bucket/prepared/train/{remote.sets[0].described['shards'][0]['file']}"
    data = bytearray(system.cat_file(place))
    data[100] ^= 1
    system.pipe_file(place, bytes(data))
    damaged: Any = Dataset.load(url, seq_len=128, packing="best_fit")
    with pytest.raises(DataError, match="checksum differs"):
        damaged.sets[0].verify()


def test_a_run_on_a_bucket_continues_and_writes_no_secret(server: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import treadle

    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(json_lines(texts()))
    url = put(tmp_path / "texts", "train")
    monkeypatch.chdir(tmp_path)
    keys: dict[str, Any] = {"streaming": True, "tokenizer": "byte", "seq_len": 64, "batch_size": 4, "arch": "transformer", "hidden_size": 32,
                            "num_hidden_layers": 1, "num_attention_heads": 2, "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "num_workers": 1, "quiet": True}  # fmt: skip
    treadle.train(url, max_steps=6, output_dir="whole", **keys)
    treadle.train(url, max_steps=6, output_dir="parts", **keys)
    for step in (4, 6):
        shutil.rmtree(f"parts/checkpoints/step-{step:08d}")
    server.breaks("GET /bucket/train", "503", "cut")
    treadle.train(url, max_steps=6, output_dir="parts", **keys)
    rows = [[json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()] for name in ("whole", "parts")]
    losses = [[(row["step"], row["loss"]) for row in some] for some in rows]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 10
    for file in written:
        assert SECRET.encode() not in file.read_bytes() and b"canary-key-id" not in file.read_bytes(), file
    assert f'path = "{url}"' in Path("parts/config.toml").read_text()


@pytest.mark.parametrize("url", [
    "s3://key:secret@bucket/a.jsonl", "https://user:word@host/a.jsonl", "https://host/a.jsonl?X-Amz-Signature=abc&x=1",
    "https://host/a.jsonl?sig=abc", "https://host/a.jsonl?apikey=abc", "https://host/a?x=1&password=abc", "https://host/a#access_token=abc",
    "abfs://user:secret@account/x",
])  # fmt: skip
def test_a_url_with_credentials_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="carries credentials") as problem:
        refuse_secrets(url)
    assert "secret" not in str(problem.value) and "abc" not in str(problem.value) and "word" not in str(problem.value)
    with pytest.raises(ConfigError, match="carries credentials"):
        Dataset.load(url, tokenizer="byte")


@pytest.mark.parametrize("url", ["abfs://container@account.dfs.core.windows.net/x", "https://host/a.jsonl?download=true", "s3://bucket/a b"])
def test_a_url_without_credentials_is_taken(url: str) -> None:
    refuse_secrets(url)


def test_memory_and_file_urls(tmp_path: Path) -> None:
    file = path_of("memory://texts/a.jsonl")
    assert isinstance(file, RemotePath)
    file.write_bytes(json_lines(texts()))
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts()))
    expected, _ = take(stream(str(tmp_path / "a.jsonl")), 3)
    for url in ("memory://texts", "memory://texts/a.jsonl", f"file://{tmp_path}/a.jsonl"):
        assert ids(take(stream(url), 3)[0]) == ids(expected), url


def test_a_remote_array_reads_as_one_in_memory() -> None:
    numbers = np.random.default_rng(0).integers(0, 60_000, 200_001).astype("<u2")
    RemotePath("memory://arrays/x.bin").write_bytes(numbers.tobytes())
    there, dice = mapped(RemotePath("memory://arrays/x.bin"), np.dtype("<u2")), random.Random(0)
    for _ in range(500):
        start = dice.randrange(len(numbers))
        stop = start + dice.choice([0, 1, 5, 1000, 40_000, 100_000])
        assert np.array_equal(there[start:stop], numbers[start:stop]) and there[start] == numbers[start]
    assert np.array_equal(np.asarray(there), numbers) and there[-1] == numbers[-1] and there.max() == numbers.max()


@pytest.mark.parametrize("key", ["/tmp/treadle-escaped", "../../escaped", "a/../../../escaped", "./x", "a//b"])
def test_object_names_that_leave_their_folder_write_nothing(server: Proxy, tmp_path: Path, key: str) -> None:
    import boto3

    with contextlib.suppress(OSError):
        Path("/tmp/treadle-escaped").unlink()
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{server.server_address[1]}")
    client.put_object(Bucket="bucket", Key="hostile/a.txt", Body=b"a")
    client.put_object(Bucket="bucket", Key=f"hostile/{key}", Body=b"evil")
    try:
        with pytest.raises(DataError, match="whose name is no file's"):
            local_copy(RemotePath("s3://bucket/hostile"), tmp_path / "root" / "deep")
    finally:
        client.delete_object(Bucket="bucket", Key=f"hostile/{key}")
    assert not Path("/tmp/treadle-escaped").exists() and not list(tmp_path.rglob("*escaped*"))
    with pytest.raises(InputError, match="holds no file"):
        local_copy(RemotePath("s3://bucket/empty"), tmp_path)


def test_requests_are_made_again_with_growing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retries.time, "sleep", waits.append)
    monkeypatch.setattr(retries, "FIRST_WAIT", 1.0)
    left = [ConnectionError("reset"), TimeoutError(), OSError("503")]

    def work() -> str:
        if left:
            raise left.pop()
        return "there"

    assert retries.attempt("reading x", work) == "there"
    assert len(waits) == 3 and all(0.5 * 2**n <= wait <= 2**n for n, wait in enumerate(waits))


class _Versioned(BaseHTTPRequestHandler):
    """One file with ranges and an ETag, and no care for If-Match."""

    content, tag, tagged = b"", "v1", True

    def log_message(self, *parts: Any) -> None:
        pass

    def do_GET(self) -> None:
        part, asked = self.content, self.headers.get("Range")
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            part = self.content[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(part)))
        if self.tagged:
            self.send_header("ETag", self.tag)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)

    do_HEAD = do_GET


def test_a_web_file_that_changes_is_never_mixed_nor_kept(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="the extra remote (aiohttp) is not installed")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Versioned)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/a.bin"
        _Versioned.content, _Versioned.tag, _Versioned.tagged = b"A" * (4 * PART_BYTES), "v1", True
        file = RemotePath(url, PartCache(tmp_path / "kept"))
        assert file.read_range(0, 10) == b"A" * 10
        _Versioned.content, _Versioned.tag = b"B" * (4 * PART_BYTES), "v2"
        with pytest.raises(DataError, match="was changed while it was read"):
            file.read_range(0, 2 * PART_BYTES)
        assert RemotePath(url, PartCache(tmp_path / "kept")).read_range(0, 2 * PART_BYTES) == b"B" * (2 * PART_BYTES)
        _Versioned.tagged = False  # a server that tells no version: nothing is kept
        assert RemotePath(url, PartCache(tmp_path / "untold")).read_range(0, 10) == b"B" * 10
        assert not list((tmp_path / "untold").rglob("*"))
    finally:
        server.shutdown()
    place = RemotePath("memory://now/x")
    for data in (b"one", b"two"):
        place.write_bytes(data)
        assert place.read_now() == data


def test_what_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"known are s3://"):
        open_source("s4://bucket/a.jsonl")
    import fsspec

    def missing(url: str, **options: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(MissingExtra, match=r"treadle\[remote\]"):
        open_source("s3://bucket/a.jsonl")
    with pytest.raises(ConfigError, match="Install s3fs"):
        open_source("gs://bucket/a.jsonl")


def test_a_web_server_without_ranges(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="the extra remote (aiohttp) is not installed")
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts()))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        file = RemotePath(f"http://127.0.0.1:{server.server_address[1]}/a.jsonl")
        assert file.state().size == (tmp_path / "a.jsonl").stat().st_size and file.state().version
        with pytest.raises(DataError, match="ranges"):
            file.read_range(100_000, 100_010)
    finally:
        server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the reader does not wait for the end
            super().handle()

    def log_message(self, *parts: Any) -> None:
        pass
