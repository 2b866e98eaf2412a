"""`treadle collatz search | cycles | records | bound`. Everything heavy is imported inside the verb."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from treadle.terminal import write as echo

Json = Annotated[bool, typer.Option("--json", help="The result as JSON on standard output, and no progress.")]
Map = Annotated[str | None, typer.Option("--map", help="A map, as in 3x+1, 3x-1 or 5x+7; default 3x+1.")]
Path = Annotated[str, typer.Option("--path", help="auto, numba or python, for 3x+1 also numpy: all give the same result.")]
Range = Annotated[str | None, typer.Option("--range", metavar="A:B|N", help="The numbers A <= n < B, or all with |n| <= N.")]


def register(app: typer.Typer) -> None:
    """Adds the verbs to the group."""
    for name, verb in (("search", search), ("cycles", cycles), ("records", records), ("bound", bound)):
        app.command(name)(verb)


def search(
    start: Annotated[str | None, typer.Argument(help="The first number, as in 2^68; default 2^71, below which all are known to reach 1.")] = None,
    map: Map = None,
    count: Annotated[str | None, typer.Option("--count", help="How many numbers, as in --count 2^36; default: until it is stopped.")] = None,
    range: Range = None,
    log: Annotated[str | None, typer.Option("--log", help="The .jsonl file it goes on from; default a name that says what is searched.")] = None,
    nice: Annotated[int, typer.Option("--nice", min=0, max=19, help="Priority: 0 as everything else, 19 after everything else.")] = 19,
    workers: Annotated[int, typer.Option("--workers", min=1, max=4096, help="Threads.")] = 1,
    path: Path = "auto",
    as_json: Json = False,
    end_with: Annotated[int | None, typer.Option("--end-with", hidden=True, help="The process that started this one.")] = None,
) -> None:
    """Search for cycles and for numbers that never come down. Upward from START or in a range, at low priority.

    The same command goes on where it stopped. Whatever is found is checked again in exact integers, written to the log and said
    here. Exit codes: 0 all is searched; 75 stopped by a signal.
    """
    from treadle.collatz import progress as showing
    from treadle.collatz import search as searching
    from treadle.collatz.arithmetic import COLLATZ, spelled
    from treadle.collatz.verify import VERIFIED
    from treadle.errors import ConfigError, Stopped

    if end_with is not None:
        _end_with(end_with)
    over = COLLATZ if map is None else _map(map)
    end: int | None
    if range is not None:
        if start is not None or count is not None:
            raise ConfigError("--range says which numbers; leave START and --count out")
        begin, end = _range(range)
    else:
        begin = VERIFIED if start is None else _number(start, "a start")
        end = None if count is None else begin + _number(count, "a count")
        log = log or str(searching.default_log(over, begin))
    searching.lower_priority(nice)
    line = showing.Line(quiet=as_json)
    where = "without an end" if end is None else f"{spelled(end - begin)} numbers"
    if not as_json:
        echo(f"searching {over} from {spelled(begin)} on, {where}{'' if log is None else f'; log: {log}'}")

    def show(result: searching.Result) -> None:
        if line.due:
            line.show(_progress(result))

    def discovered(found: object) -> None:
        line.say(f"!!! discovery: {found}")

    try:
        with showing.stop_signals(line) as stop:
            result = searching.search(begin, end, over, log, path=path, workers=workers, stopping=stop, progress=show, say=line.say,
                                      on_discovery=discovered)  # fmt: skip
    finally:
        line.clear()
    if as_json:
        _json(result.as_dict())
    else:
        for text in _summary(result):
            echo(text)
    if not result.complete:
        raise Stopped(f"stopped by {stop.signal}")


def cycles(
    q: Annotated[int | None, typer.Option("--q", help="The factor of the map q x + c; odd; default 3.")] = None,
    c: Annotated[int | None, typer.Option("--c", help="The constant; odd, of either sign; default 1.")] = None,
    map: Map = None,
    length: Annotated[int | None, typer.Option("--length", min=1, help="By algebra: all cycles of at most this many shortcut steps; default 18.")] = None,
    range: Range = None,
    path: Path = "auto",
    as_json: Json = False,
) -> None:
    """Cycles of a map q x + c. All of at most --length shortcut steps, by algebra, or all that the numbers of a --range run into.

    A cycle is named by its member of least absolute value. Exit code 0 also where nothing is found.
    """
    from treadle.collatz import progress as showing
    from treadle.collatz.cycle_search import settle
    from treadle.collatz.cycles import DEFAULT_LENGTH, algebraic_cycles, cycle_through
    from treadle.collatz.known_cycles import known, was_searched
    from treadle.errors import ConfigError, Stopped

    if map is not None and (q is not None or c is not None):
        raise ConfigError("--map says the map; leave --q and --c out")
    over = _map(map) if map is not None else _map(f"{3 if q is None else q}x{1 if c is None else c:+d}")
    found: dict[int, Any] = {}
    line = showing.Line(quiet=as_json)
    given_up, how = 0, []
    try:
        with showing.stop_signals(line) as stop:

            def tried(words: int) -> None:
                if stop():
                    raise Stopped(f"stopped by {stop.signal}")
                if line.due:
                    line.show(f"by algebra: {showing.rounded(words)} words of parities")

            if length is not None or range is None:
                for cycle in algebraic_cycles(over, length or DEFAULT_LENGTH, path, tried):
                    found[cycle.representative] = cycle
                how.append(f"all of at most {length or DEFAULT_LENGTH} shortcut steps")
            if range is not None:
                first, last = _range(range)
                totals = settle(over, first, last, path, stop, lambda at: line.show(f"reached {at:,}") if line.due else None)
                if totals is None:
                    raise Stopped(f"stopped by {stop.signal}")
                given_up = totals.unresolved_count
                for n in totals.cycles:
                    found[n] = cycle_through(over, n)
                how.append(f"all that {first:,} <= n < {last:,} run into")
    finally:
        line.clear()
    listed = sorted(found.values(), key=lambda cycle: (abs(cycle.representative), cycle.representative < 0))
    expected = known(over)
    if as_json:
        _json({"map": str(over), "searched": how, "unresolved": given_up, "searched_before": was_searched(over),
               "cycles": [{**cycle.as_dict(), "known": cycle.representative in expected} for cycle in listed]})  # fmt: skip
        return
    echo(f"{over}: {len(listed)} {'cycle' if len(listed) == 1 else 'cycles'}; {' and '.join(how)}")
    for cycle in listed:
        new = "" if cycle.representative in expected else "   not in the known list" if was_searched(over) else "   new: nobody keeps a list of this map here"
        echo(f"{cycle.representative:>12,}  {cycle.shortcut_steps:>5} shortcut steps, {cycle.odd_steps:>4} odd, "
             f"{cycle.standard_steps:>5} standard   {_members(cycle)}{new}")  # fmt: skip
    if given_up:
        echo(f"{given_up:,} numbers grew beyond the limit and were given up: nothing is said about them")


def records(
    below: Annotated[str, typer.Option("--below", help="All records n < this, as in 10^8.")] = "10^8",
    kind: Annotated[str, typer.Option("--kind", help="delay (steps to 1) or path (the largest number on the way).")] = "delay",
    log: Annotated[str | None, typer.Option("--log", help="A .jsonl file that a long search goes on from.")] = None,
    path: Path = "auto",
    as_json: Json = False,
) -> None:
    """Numbers that break the record of all smaller ones. Of stopping time, or of the largest number on the way, under 3x + 1."""
    from treadle.collatz import progress as showing
    from treadle.collatz import records_log
    from treadle.collatz.arithmetic import spelled
    from treadle.errors import Stopped

    line = showing.Line(quiet=as_json)
    end = _number(below, "a limit")

    def show(at: records_log.Progress) -> None:
        if line.due:
            line.show(f"below {spelled(at.reached)}: {at.count} records, {showing.rounded(at.rate)} numbers/s, "
                      f"{showing.duration(at.remaining)} left")  # fmt: skip

    try:
        with showing.stop_signals(line) as stop:
            search = records_log.search(end, kind, path, log, stop, show, line.say)
    finally:
        line.clear()
    if as_json:
        _json({"kind": kind, "below": str(search.reached), "records": [{"number": str(each.number), "value": str(each.value)} for each in search.records]})
    else:
        echo(f"{'number':>22}  {'steps to 1' if kind == 'delay' else 'largest number'}")
        for each in search.records:
            echo(f"{each.number:>22,}  {each.value:,}")
        name = "delay" if kind == "delay" else "path"
        echo(f"{len(search.records)} {name} records below {spelled(search.reached)}, all of them")
    if search.reached < end:
        raise Stopped(f"stopped by {stop.signal}")


def bound(
    limit: Annotated[str | None, typer.Argument(help="All numbers below it reach 1; default 2^71 (Barina 2025).")] = None,
    as_json: Json = False,
) -> None:
    """How long a cycle of 3x + 1 other than 1, 4, 2 must be. Given that all numbers below LIMIT reach 1 (Eliahou 1993)."""
    from treadle.collatz.arithmetic import spelled
    from treadle.collatz.bound import cycle_bound
    from treadle.collatz.verify import VERIFIED

    found = cycle_bound(VERIFIED if limit is None else _number(limit, "a limit"))
    if as_json:
        _json(found.as_dict())
        return
    echo(f"all numbers below {spelled(found.limit)} reach 1, so any other cycle of positive numbers has at least")
    echo(f"{found.standard_steps:>22,} members (steps of n/2, 3n + 1)")
    echo(f"{found.shortcut_steps:>22,} shortcut steps, of which")
    echo(f"{found.odd_steps:>22,} are odd")


def _map(text: str) -> Any:
    from treadle.collatz.arithmetic import Map
    from treadle.errors import ConfigError

    if len(text) > 1000:
        raise ConfigError("a map's q and c have at most some hundred digits")
    return Map.parse(text)


def _number(text: str, what: str) -> int:
    from treadle.collatz.arithmetic import number
    from treadle.collatz.cycle_search import LARGEST
    from treadle.errors import ConfigError

    found = number(text, what)
    if abs(found) > LARGEST:
        raise ConfigError(f"{what} of at most 2^10000, please")
    return found


def _range(text: str) -> tuple[int, int]:
    """ "A:B" is [A, B), "N" is [-N, N]."""
    from treadle.errors import ConfigError

    if ":" not in text:
        size = _number(text, "a range")
        if size < 0:
            raise ConfigError(f"--range {text}: write N >= 0 for all |n| <= N, or A:B")
        return -size, size + 1
    first, _, last = text.partition(":")
    low, high = _number(first, "the begin of a range"), _number(last, "the end of a range")
    if low >= high:
        raise ConfigError(f"--range {text}: A is below B, as in --range=-1000:1000")
    return low, high


def _members(cycle: Any) -> str:
    members = [n for _, n in zip(range(6), cycle.members())]
    return " -> ".join(f"{n:,}" for n in members) + (" -> ..." if cycle.shortcut_steps > len(members) else "")


def _progress(result: Any) -> str:
    from treadle.collatz import progress as showing
    from treadle.collatz.arithmetic import spelled

    rate = result.numbers / result.seconds if result.seconds > 0 else 0.0
    left = ""
    if result.end is not None and rate:
        left = f", {showing.duration((result.end - result.reached) / rate)} left"
    found = len(result.discoveries) + len(result.known_discoveries)
    return f"reached {spelled(result.reached)}, {showing.rounded(rate)} numbers/s, {found} discoveries{left}"


def _summary(result: Any) -> list[str]:
    from treadle.collatz import progress as showing
    from treadle.collatz.arithmetic import spelled

    rate = result.numbers / result.seconds if result.seconds > 0 else 0.0
    lines = [f"{'done' if result.complete else 'stopped'}: {spelled(result.reached - result.start)} numbers from {spelled(result.start)} on, "
             f"{spelled(result.numbers)} of them in this run ({showing.duration(result.seconds)}, {showing.rounded(rate)} numbers/s)"]  # fmt: skip
    if result.cycles:
        lines.append("cycles met, by the member of least absolute value: " + ", ".join(f"{n:,}" for n in sorted(result.cycles, key=lambda n: (abs(n), n < 0))))
    if result.unresolved:
        lines.append(f"{result.unresolved:,} numbers grew beyond the limit or took too long: nothing is said about them")
    lines.append(f"largest number met: {result.maximum:,}, from {result.argmax:,}")
    lines += [f"discovery of an earlier run: {found}" for found in result.known_discoveries]
    lines.append(f"discoveries in this run: {len(result.discoveries)}")
    if result.log is not None:
        lines.append(f"log: {result.log}{'' if result.complete else '; the same command goes on'}")
    return lines


def _json(found: dict[str, Any]) -> None:
    echo(json.dumps(found))


def _end_with(parent: int) -> None:
    """Ends with the process that started this one, also where that one is gone already."""
    import os

    from treadle.errors import Stopped
    from treadle.processes import end_with_parent

    end_with_parent()
    if os.getppid() != parent:
        raise Stopped("the process that started this search is gone")
