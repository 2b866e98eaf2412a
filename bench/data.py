"""Data read, tokenised and packed on the way: treadle's streams and prepared text beside Hugging Face streaming.

    python -m bench.data [--megabytes 40] [--rounds 3]

The same JSON lines, BPE of 2048 tokens and rows of 1024 in batches of 16 for all, each measurement in a process of its own, in
turns; CPU seconds count all threads and workers. Hugging Face streaming as its guide has it: shuffle with a buffer, map(batched)
with encode_batch_fast, group into rows; it leaks across documents, shuffles inside its buffer, and goes on with state_dict. Peers that
are not installed are named and left out.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LENGTH, ROWS, BUFFER = 1024, 16, 10_000
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


def hugging_face_rows(source: Path, tokenizer: Path, position: Any) -> Iterator[tuple[int, Any]]:
    import datasets
    import torch
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    end = made.get_vocab_size() - 1

    def rows(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = list(itertools.chain.from_iterable([*one.ids, end] for one in made.encode_batch_fast(batch["text"], add_special_tokens=False)))
        return {"input_ids": [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)]}

    data = datasets.load_dataset("json", data_files=str(source), streaming=True, split="train").shuffle(seed=0, buffer_size=BUFFER)
    data = data.map(rows, batched=True, batch_size=1000, remove_columns=["text"])
    if position is not None:
        data.load_state_dict(position)
    for batch in data.iter(batch_size=ROWS):
        ids = torch.tensor(batch["input_ids"])
        yield ids.numel(), data


CONTENDERS = ("treadle stream", "treadle stream, 2 workers", "treadle prepared", "Hugging Face streaming")


def rows_of(name: str, source: Path, tokenizer: Path, position: Any = None) -> Iterator[tuple[int, Any]]:
    if name.startswith("treadle"):
        return treadle_rows(source, tokenizer, "stream" in name, position, 2 * ("workers" in name))
    return hugging_face_rows(source, tokenizer, position)


def peak_megabytes() -> float:
    """Of this process and its running workers, added up (pages they share count in each)."""
    total = 0
    for status in [Path("/proc/self/status"), *(Path(f"/proc/{child}/status") for child in children())]:
        with contextlib.suppress(OSError, StopIteration):
            total += int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
    return total / 1e3


def measure(name: str, source: Path, tokenizer: Path, tokens: int, saved: Path | None, resume: Path | None) -> dict[str, float]:
    """Tokens per CPU second from the first batch on (nearly an epoch, so that what is read before and ahead does not count); or, going on from `resume`, the first batch's seconds."""
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
        saved.write_text(json.dumps(place if name.startswith("treadle") else place.state_dict()))
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__)
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, source, tokenizer, tokens, saved, resume = given.one
        optional = [None if path == "-" else Path(path) for path in (saved, resume)]
        print(json.dumps(measure(name, Path(source), Path(tokenizer), int(tokens), *optional)), flush=True)
        os._exit(0)  # some peers end slowly
    from treadle.text.base import Tokenizer

    contenders = list(CONTENDERS)
    if importlib.util.find_spec("datasets") is None:
        contenders.remove("Hugging Face streaming")
        print("Hugging Face streaming is left out: pip install datasets")
    with tempfile.TemporaryDirectory() as folder:
        home, cache = Path(folder), Path(folder) / "cache"
        source, tokenizer = home / "a.jsonl", home / "tokenizer"
        write_source(source, given.megabytes)
        texts = (json.loads(line)["text"] for line in itertools.islice(source.open(encoding="utf-8"), 9000))
        Tokenizer.train("bpe", texts, 2048).save(tokenizer)
        whole = int(given.megabytes * 1e6 / 3.3)  # tokens, about
        prepared = apart(cache, "treadle prepared", source, tokenizer, ROWS * LENGTH, "-", "-")
        print(f"preparing all of it, once: {prepared['first_cpu']:.1f} CPU seconds, import included")
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for _ in range(given.rounds):
            for name in contenders:
                runs[name].append(apart(cache, name, source, tokenizer, int(whole * 0.9), "-", "-"))
        print("| | tokens a CPU second | against Hugging Face | first batch, seconds | after 10% | after 90% | CPU seconds after 10%, 90% | peak MB |")
        print("|---|---|---|---|---|---|---|---|")

        def median(name: str, key: str) -> float:
            return statistics.median(run[key] for run in runs[name])

        for name in contenders:
            resumed = []
            for share in (0.1, 0.9):
                saved = home / f"{name}-{share}.json"
                apart(cache, name, source, tokenizer, int(whole * share * 0.95), saved, "-")
                again = [apart(cache, name, source, tokenizer, 1, "-", saved) for _ in range(given.rounds)]
                resumed.append([statistics.median(run[key] for run in again) for key in ("first_seconds", "first_cpu")])
            against = median(name, "tokens_per_cpu") / median(contenders[-1], "tokens_per_cpu") if len(contenders) == len(CONTENDERS) else 0.0
            print(f"| {name} | {median(name, 'tokens_per_cpu'):,.0f} | {against:.2f} | {median(name, 'first_seconds'):.2f} "
                  f"| {resumed[0][0]:.2f} | {resumed[1][0]:.2f} | {resumed[0][1]:.2f}, {resumed[1][1]:.2f} | {median(name, 'peak'):.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
