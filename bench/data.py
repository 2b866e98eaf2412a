"""Data read, tokenised and packed on the way: treadle's streams and prepared text beside three peers.

    python -m bench.data [--megabytes 40] [--rounds 3]
    python -m bench.data --large [--megabytes 40]       # memory and resume of streams on 20 times the text

The same JSON lines, BPE of 2048 tokens and rows of 1024 in batches of 16 for all, each measurement in a process of its own, in
turns; CPU seconds count all threads and workers. Each peer as its guide has it, tokenising with encode_batch_fast, a thousand texts
at a time: Hugging Face streaming (shuffle with a buffer, map(batched)), Grain (the lines' places are found first, then shuffle, batch,
map; its read-ahead is held to 4,000 texts, since it would otherwise be through before the clock starts), MosaicML Streaming (converted to
its shards first, which is timed apart). All three leak across documents. Peers that are not installed are named and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import lzma
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LENGTH, ROWS, BUFFER, TEXTS = 1024, 16, 10_000, 1000
CORPUS = Path(__file__).parents[1] / "treadle" / "corpus" / "austen.txt.xz"


def write_source(path: Path, megabytes: float) -> None:
    """Paragraphs of the bundled novels, each time in another order, with a number that makes them differ."""
    paragraphs = [p for p in lzma.open(CORPUS, "rt", encoding="utf-8").read().split("\n\n") if len(p) > 40]
    dice, number = random.Random(0), 0
    with path.open("w", encoding="utf-8") as out:
        while out.tell() < megabytes * 1e6:
            for text in dice.sample(paragraphs, len(paragraphs)):
                out.write(json.dumps({"text": f"{number}. {text}"}) + "\n")
                number += 1


def children() -> dict[int, tuple[int, int]]:
    """Process ids of the workers that run, with their clock ticks (user, system)."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if int(fields[1]) == os.getpid():
            found[int(stat.parent.name)] = int(fields[11]), int(fields[12])
    return found


def cpu_seconds() -> float:
    """Of this process, its children that have ended, and those that run (workers)."""
    used = sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
    for user, system in children().values():
        used += (user + system) / os.sysconf("SC_CLK_TCK")
    return used


# ---- contenders: (batches of ids, tokens in each; where to go on from) ----


def treadle_rows(source: Path, tokenizer: Path, streaming: bool, position: Any, workers: int = 0) -> Iterator[tuple[int, Any]]:
    import treadle
    from treadle.data.base import BatchPlan

    data = treadle.Dataset.load(str(source), tokenizer=str(tokenizer), seq_len=LENGTH, streaming=streaming, validation_fraction=0.0)
    for (batch,), after in data.batches(data.start if position is None else position, BatchPlan(0, ROWS, workers=workers)):
        yield batch.counts["tokens"], after


def as_rows(tokenizer: Path) -> Callable[[list[str]], list[list[int]]]:
    """Texts -> rows, as the peers' guides do it: joined, cut, the rest dropped."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    end = made.get_vocab_size() - 1

    def rows(texts: list[str]) -> list[list[int]]:
        encoded = made.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = list(itertools.chain.from_iterable([*one.ids, end] for one in encoded))
        return [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)]

    return rows


def in_batches(rows: Iterator[list[list[int]]]) -> Iterator[int]:
    """Tokens of each batch of ROWS rows."""
    import torch

    held: list[list[int]] = []
    for more in rows:
        held += more
        while len(held) >= ROWS:
            yield torch.tensor(held[:ROWS]).numel()
            held = held[ROWS:]


def hugging_face_rows(source: Path, tokenizer: Path, position: Any) -> Iterator[tuple[int, Any]]:
    import datasets
    import torch

    rows = as_rows(tokenizer)
    data = datasets.load_dataset("json", data_files=str(source), streaming=True, split="train").shuffle(seed=0, buffer_size=BUFFER)
    data = data.map(lambda batch: {"input_ids": rows(batch["text"])}, batched=True, batch_size=TEXTS, remove_columns=["text"])
    if position is not None:
        data.load_state_dict(position)
    for batch in data.iter(batch_size=ROWS):
        ids = torch.tensor(batch["input_ids"])
        yield ids.numel(), data.state_dict


class Lines:
    """JSON lines by number, for Grain."""

    def __init__(self, path: Path) -> None:
        import numpy as np

        ends = np.flatnonzero(np.memmap(path, dtype=np.uint8, mode="r") == 10) + 1
        self.starts, self.stream = [0, *ends.tolist()], path.open("rb")

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> str:
        start = self.starts[number]
        return json.loads(os.pread(self.stream.fileno(), self.starts[number + 1] - start, start))["text"]


def grain_rows(source: Path, tokenizer: Path, position: Any) -> Iterator[tuple[int, Any]]:
    import grain

    data = grain.MapDataset.source(Lines(source)).seed(0).shuffle().batch(TEXTS, batch_fn=list).map(as_rows(tokenizer))
    made = iter(data.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
    if position is not None:
        made.set_state(position)
    for count in in_batches(made):
        yield count, made.get_state


def mosaic_shards(source: Path) -> Path:
    """The source as MosaicML's shards, beside it."""
    from streaming import MDSWriter

    folder = source.with_suffix(".mds")
    if not folder.exists():
        with MDSWriter(out=str(folder), columns={"text": "str"}) as writer, source.open(encoding="utf-8") as lines:
            for line in lines:
                writer.write({"text": json.loads(line)["text"]})
    return folder


def mosaic_rows(source: Path, tokenizer: Path, position: Any) -> Iterator[tuple[int, Any]]:
    from streaming import StreamingDataset

    rows = as_rows(tokenizer)
    data, read = StreamingDataset(local=str(mosaic_shards(source)), shuffle=True, shuffle_seed=0, batch_size=TEXTS), 0
    if position is not None:
        data.load_state_dict(position)
        read = position["sample_in_epoch"]
    samples = iter(data)

    def texts() -> Iterator[list[list[int]]]:
        nonlocal read
        while some := [sample["text"] for sample in itertools.islice(samples, TEXTS)]:
            read += len(some)
            yield rows(some)

    for count in in_batches(texts()):
        yield count, lambda: data.state_dict(num_samples=read, from_beginning=True)


CONTENDERS = {
    "treadle stream": None,
    "treadle stream, 2 workers": None,
    "treadle prepared": None,
    "Hugging Face streaming": "datasets",
    "Grain": "grain",
    "MosaicML Streaming": "streaming",
}  # and the package that it needs


def rows_of(name: str, source: Path, tokenizer: Path, position: Any = None) -> Iterator[tuple[int, Any]]:
    if name.startswith("treadle"):
        return treadle_rows(source, tokenizer, "stream" in name, position, 2 * ("workers" in name))
    peers = {"Hugging Face streaming": hugging_face_rows, "Grain": grain_rows, "MosaicML Streaming": mosaic_rows}
    return peers[name](source, tokenizer, position)


def peak_megabytes() -> float:
    """Of this process and its running workers, added up (pages they share count in each)."""
    total = 0
    for status in [Path("/proc/self/status"), *(Path(f"/proc/{child}/status") for child in children())]:
        with contextlib.suppress(OSError, StopIteration):
            total += int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
    return total / 1e3


def measure(name: str, source: Path, tokenizer: Path, tokens: int, saved: Path | None, resume: Path | None) -> dict[str, float]:
    """Tokens per CPU second from the first batch on (nearly an epoch, so that what is read before and ahead does not count); or,
    going on from `resume`, the first batch's seconds."""
    position = json.loads(resume.read_text()) if resume is not None else None
    begun, used = time.perf_counter(), cpu_seconds()
    rows = rows_of(name, source, tokenizer, position)
    next(rows)
    first = {"first_seconds": time.perf_counter() - begun, "first_cpu": cpu_seconds() - used}
    if resume is not None:
        return first
    begun, used, count = time.perf_counter(), cpu_seconds(), 0
    place: Any = None
    for number, after in rows:
        count, place = count + number, after
        if count >= tokens:
            break
    if saved is not None:
        saved.write_text(json.dumps(place() if callable(place) else place))
    found = {**first, "tokens_per_cpu": count / (cpu_seconds() - used), "tokens_per_second": count / (time.perf_counter() - begun),
             "peak": peak_megabytes()}  # fmt: skip
    rows.close()  # type: ignore[attr-defined]
    return found


def apart(cache: Path, *arguments: object) -> dict[str, float]:
    """The same in a process of its own."""
    environment = {**os.environ, "TREADLE_CACHE": str(cache), "HF_HOME": str(cache / "hf"), "HF_DATASETS_OFFLINE": "1",
                   "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    line = [sys.executable, "-m", "bench.data", "--one", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def train_tokenizer(source: Path, folder: Path) -> None:
    from treadle.text.base import Tokenizer

    texts = (json.loads(line)["text"] for line in itertools.islice(source.open(encoding="utf-8"), 9000))
    Tokenizer.train("bpe", texts, 2048).save(folder)


def large(megabytes: float, rounds: int) -> None:
    """Peak memory at a size and at 20 times it, over the same number of tokens, and the first batch after 10% and 90% of the larger."""
    with tempfile.TemporaryDirectory() as folder:
        home, cache = Path(folder), Path(folder) / "cache"
        sizes = {megabytes: home / "small.jsonl", 20 * megabytes: home / "large.jsonl"}
        for size, source in sizes.items():
            write_source(source, size)
        train_tokenizer(home / "small.jsonl", home / "tokenizer")
        peaks = [apart(cache, "treadle stream", source, home / "tokenizer", int(megabytes * 2.7e5), "-", "-")["peak"] for source in sizes.values()]
        print(f"peak memory: {peaks[0]:.0f} MB at {megabytes:g} MB of text, {peaks[1]:.0f} MB at {20 * megabytes:g}")
        for share in (0.1, 0.9):
            saved = home / f"{share}.json"
            apart(cache, "treadle stream", home / "large.jsonl", home / "tokenizer", int(20 * megabytes * 1e6 / 3.3 * share), saved, "-")
            again = [apart(cache, "treadle stream", home / "large.jsonl", home / "tokenizer", 1, "-", saved) for _ in range(rounds)]
            median = [statistics.median(run[key] for run in again) for key in ("first_seconds", "first_cpu")]
            print(f"first batch after {share:.0%} of {20 * megabytes:g} MB: {median[0]:.2f} seconds, {median[1]:.2f} CPU seconds")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__)
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="memory and resume of streams on 20 times the text")
    parser.add_argument("--one", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, source, tokenizer, tokens, saved, resume = given.one
        optional = [None if path == "-" else Path(path) for path in (saved, resume)]
        print(json.dumps(measure(name, Path(source), Path(tokenizer), int(tokens), *optional)), flush=True)
        os._exit(0)  # some peers end slowly
    if given.large:
        large(given.megabytes, given.rounds)
        return
    contenders = []
    for name, package in CONTENDERS.items():
        if package is None or importlib.util.find_spec(package) is not None:
            contenders.append(name)
        else:
            print(f"{name} is left out: its package {package!r} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        home, cache = Path(folder), Path(folder) / "cache"
        source, tokenizer = home / "a.jsonl", home / "tokenizer"
        write_source(source, given.megabytes)
        train_tokenizer(source, tokenizer)
        whole = int(given.megabytes * 1e6 / 3.3)  # tokens, about
        prepared = apart(cache, "treadle prepared", source, tokenizer, ROWS * LENGTH, "-", "-")
        print(f"preparing all of it, once: {prepared['first_cpu']:.1f} CPU seconds, import included")
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        if "MosaicML Streaming" in contenders:
            used = cpu_seconds()
            mosaic_shards(source)
            print(f"converting all of it to MosaicML's shards, once: {cpu_seconds() - used:.1f} CPU seconds")
        for _ in range(given.rounds):
            for name in contenders:
                runs[name].append(apart(cache, name, source, tokenizer, int(whole * 0.9), "-", "-"))
        print("| | tokens a CPU second | against the fastest peer | first batch, seconds | after 10% | after 90% | CPU seconds after 10%, 90% | peak MB |")
        print("|---|---|---|---|---|---|---|---|")

        def median(name: str, key: str) -> float:
            return statistics.median(run[key] for run in runs[name])

        fastest = max((median(name, "tokens_per_cpu") for name in contenders if not name.startswith("treadle")), default=float("nan"))
        for name in contenders:
            resumed = []
            for share in (0.1, 0.9):
                saved = home / f"{name}-{share}.json"
                apart(cache, name, source, tokenizer, int(whole * share * 0.95), saved, "-")
                again = [apart(cache, name, source, tokenizer, 1, "-", saved) for _ in range(given.rounds)]
                resumed.append([statistics.median(run[key] for run in again) for key in ("first_seconds", "first_cpu")])
            print(f"| {name} | {median(name, 'tokens_per_cpu'):,.0f} | {median(name, 'tokens_per_cpu') / fastest:.2f} | {median(name, 'first_seconds'):.2f} "
                  f"| {resumed[0][0]:.2f} | {resumed[1][0]:.2f} | {resumed[0][1]:.2f}, {resumed[1][1]:.2f} | {median(name, 'peak'):.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
