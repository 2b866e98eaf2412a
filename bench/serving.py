"""Sixteen concurrent requests against one at a time, on the same engine: tokens a second.

    python -m bench.serving [--quick] [--only NAME]

Greedy, prompts of 8 to 68 tokens, 100 new tokens each. "One at a time" has always one request running, the next beginning when it
has ended. One process and thread, in turns, CPU seconds (so that what else the machine does counts little); medians over rounds. The
dense shape is that of bench/generate.py (13.8M parameters), in the formats that weights are read in; the others are of 6 x 256 on
bytes. Beside it: how long running rows stand still while a long prompt is read, and what the rows' state takes.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from bench.side_by_side import medians, one_thread, show

DENSE = {"vocab_size": 8192, "hidden_size": 384, "num_layers": 6, "num_heads": 6, "initializer_range": 0.05}
BYTES = {"vocab_size": 256, "hidden_size": 256, "num_layers": 6}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "dense fp32": ("transformer", DENSE, "fp32"), "dense bf16": ("transformer", DENSE, "bf16"), "dense int8": ("transformer", DENSE, "int8"),
    "hgrn_bit": ("hgrn_bit", BYTES, "fp32"), "shc": ("shc", {**BYTES, "num_heads": 4}, "fp32"),
}  # fmt: skip
ROWS, MAX_LEN, LONG = 16, 1280, 1024


def requests(vocabulary: int, count: int = ROWS) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(vocabulary) for _ in range(8 + 4 * number)] for number in range(count)]


def answered(engine: Any, prompts: Sequence[list[int]], new: int, together: int) -> list[list[int]]:
    """What the engine writes after each prompt, `together` of them running at any time."""
    from treadle.generation.engine import Request, Token
    from treadle.generation.sampling import Sampling

    written: list[list[int]] = [[] for _ in prompts]
    room, all_ended = threading.Semaphore(together), [threading.Event() for _ in prompts]

    def ask(number: int) -> None:
        def on_token(token: Token) -> None:
            written[number].append(token.id)

        def on_end(reason: str) -> None:
            room.release()
            all_ended[number].set()

        engine.submit(Request(list(prompts[number]), new, Sampling(temperature=0.0), on_token=on_token, on_end=on_end))

    for number in range(len(prompts)):
        room.acquire()
        ask(number)
    for ended in all_ended:
        ended.wait()
    return written


def concurrency(engine: Any, quick: bool) -> dict[str, Any]:
    """Tokens per CPU second of both ways, and whether they write the same."""
    prompts, new = requests(engine.vocabulary), 4 if quick else 100
    found: dict[str, list[list[int]]] = {}

    def way(name: str, together: int) -> Callable[[], Any]:
        return lambda: found.__setitem__(name, answered(engine, prompts, new, together))

    taken = medians({"one": way("one", 1), "sixteen": way("sixteen", ROWS)}, 1 if quick else 3)
    tokens = len(prompts) * new
    return {
        "one at a time: tokens a CPU second": tokens / taken["one"], "sixteen at once: tokens a CPU second": tokens / taken["sixteen"],
        "sixteen at once over one at a time": taken["one"] / taken["sixteen"],
        "share of requests equal to themselves alone": sum(a == b for a, b in zip(found["one"], found["sixteen"])) / len(prompts),
    }  # fmt: skip


def standstill(engine: Any, quick: bool) -> dict[str, Any]:
    """The longest time between two tokens of a running request while a long prompt is read, and the usual one; seconds."""
    from treadle.generation.engine import Request, Token
    from treadle.generation.sampling import Sampling

    times: list[float] = []
    under_way, ended = threading.Event(), threading.Event()

    def on_token(token: Token) -> None:
        times.append(time.perf_counter())
        if len(times) == 8:
            under_way.set()

    new = 24 if quick else 64
    engine.submit(Request(requests(engine.vocabulary)[0], new, Sampling(temperature=0.0), on_token=on_token, on_end=lambda reason: ended.set()))
    under_way.wait()
    done = threading.Event()
    long = requests(engine.vocabulary, 1)[0] * (LONG // 8)
    engine.submit(Request(long, 1, Sampling(temperature=0.0), on_end=lambda reason: done.set()))
    ended.wait()
    done.wait()
    gaps = sorted(b - a for a, b in pairwise(times))
    return {f"longest pause beside a prompt of {LONG}: ms": gaps[-1] * 1e3, "usual time between tokens: ms": gaps[len(gaps) // 2] * 1e3}


def measure(quick: bool, only: str | None = None) -> dict[str, Any]:
    """Everything on one thread, by name."""
    import treadle
    from treadle.generation.engine import Engine

    values: dict[str, Any] = {}
    with one_thread():
        for name, (arch, shape, weights) in CASES.items():
            if only is not None and only != name:
                continue
            engine = Engine(treadle.build(arch, **shape), rows=ROWS, max_len=MAX_LEN, weights=weights)
            engine.start()
            for part in (concurrency, standstill):
                values |= {f"{name}, {figure}": value for figure, value in part(engine, quick).items()}
            values[f"{name}, state bytes"] = engine.stats()["state_bytes"]
            engine.stop()
    return values


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and short: for correctness, not for figures")
    parser.add_argument("--only", choices=list(CASES), help="one model")
    given = parser.parse_args()
    show(measure(given.quick, given.only))


if __name__ == "__main__":
    main()
