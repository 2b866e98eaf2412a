"""The verbs of `treadle collatz`: ranges proved, certificates checked and joined, trajectories plotted. Everything heavy is
imported inside the verb."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from treadle import cli_collatz_search
from treadle.terminal import write as echo

collatz_app = typer.Typer(
    help="The 3x+1 problem: proofs, searches, and learning from it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="The result as JSON on standard output, and no progress.")]
NUMBER = "An integer, also as 10^8, 2^68 or 2^68+2^20."


@collatz_app.command("verify")
def verify(
    start: Annotated[str, typer.Argument(help=f"The first number. {NUMBER}")],
    end: Annotated[str | None, typer.Argument(help="The number after the last one; or --count.")] = None,
    count: Annotated[str | None, typer.Option("--count", help="How many numbers, as in --count 2^36.")] = None,
    bits: Annotated[str | None, typer.Option("--bits", help="Blocks of 2^BITS numbers, 8 to 44; default 36, in long intervals up to 40.")] = None,
    workers: Annotated[str, typer.Option("--workers", help="How many units at once; auto is one for each core.")] = "auto",
    path: Annotated[str, typer.Option("--path", help="auto, numba, numpy or python: all give the same certificate.")] = "auto",
    output: Annotated[str | None, typer.Option("--output", help="The certificate, a .jsonl file; default a name that says the interval.")] = None,
    cluster: Annotated[str | None, typer.Option("--cluster", metavar="ray|ADDRESS", help="Work on a Ray cluster, as in --cluster HOST:6379.")] = None,
    as_json: Json = False,
) -> None:
    """Prove that every number of [START, END) comes below itself. The same command continues after any interruption.

    If all smaller numbers reach 1, so do these. Every finished unit is a line of the certificate, which is all that is kept.
    Exit codes: 0 all is proved; 75 stopped by a signal; 3 a number did not come down.
    """
    from treadle.collatz import progress as showing
    from treadle.collatz import summary
    from treadle.collatz import verify as verifying
    from treadle.collatz.arithmetic import number
    from treadle.collatz.blocks import MOST_STEPS
    from treadle.errors import Stopped

    last = None if end is None else number(end, "the end")
    how_many = None if count is None else number(count, "a count")
    first, last = verifying.interval(number(start, "the start"), last, how_many)
    size = None if bits is None else number(bits, "a number of bits")
    line = showing.Line(quiet=as_json)

    def show(at: verifying.Progress) -> None:
        if line.due:
            line.show(summary.progress_line(at))

    try:
        with showing.stop_signals(line) as stop:
            result = verifying.verify(first, last, output, bits=size, workers=workers, path=path, cluster=cluster,
                                      stopping=stop, progress=show, say=line.say)  # fmt: skip
    finally:
        line.clear()
    if as_json:
        _json(result.as_dict())
    else:
        for text in summary.lines_of(result, stop.signal):
            echo(text)
    if result.unresolved:
        raise verifying.NotDown(f"{result.unresolved[0]} did not come below itself after {MOST_STEPS:,} steps; it is in {result.certificate}")
    if not result.complete:
        raise Stopped(f"stopped by {stop.signal}")


cli_collatz_search.register(collatz_app)  # search, cycles, records, bound: in this place of the help


@collatz_app.command("audit")
def audit(
    certificate: Annotated[str, typer.Argument(help="The .jsonl file of verify or merge.")],
    samples: Annotated[str, typer.Option("--samples", help="Units to compute again, and small blocks to search for numbers left out wrongly.")] = "8",
    seed: Annotated[int, typer.Option("--seed", help="Chooses them.")] = 0,
    path: Annotated[str, typer.Option("--path", help="auto, numba, numpy or python.")] = "auto",
    as_json: Json = False,
) -> None:
    """Check a certificate. Its lines and hashes, some of its work once more, and that its sieve leaves nothing out wrongly."""
    from treadle.collatz import checking
    from treadle.collatz import progress as showing
    from treadle.collatz.arithmetic import number

    line = showing.Line(quiet=as_json)
    try:
        report = checking.check_certificate(certificate, number(samples, "a number of samples"), seed, path,
                                            lambda text: line.show(text) if line.live else None)  # fmt: skip
    finally:
        line.clear()
    if as_json:
        _json(report.as_dict())
    else:
        for text in report.lines():
            echo(text)
    if report.failures:
        raise checking.Refuted(f"{certificate} failed its audit: {report.failures[0]}; make it again, with another --output")


@collatz_app.command("merge")
def merge(
    certificates: Annotated[list[str], typer.Argument(help="Certificates, .jsonl files.")],
    start: Annotated[str | None, typer.Option("--from", help="Where the interval begins; default the first block.")] = None,
    end: Annotated[str | None, typer.Option("--to", help="The number after its last one; default the end of the last block.")] = None,
    output: Annotated[str | None, typer.Option("--output", help="A new file for the merged certificate.")] = None,
    as_json: Json = False,
) -> None:
    """Join certificates and prove that they cover an interval. Holes and overlaps are named; exit code 1 for holes."""
    from treadle.collatz import merge as merging
    from treadle.collatz.arithmetic import number

    low, high = (None if text is None else number(text) for text in (start, end))
    result = merging.merge(certificates, low, high, output)
    if as_json:
        _json(result.as_dict())
    else:
        for text in result.lines():
            echo(text)
    if not result.complete:
        raise typer.Exit(3 if result.unresolved else 1)


@collatz_app.command("plot")
def plot(
    what: Annotated[str, typer.Argument(metavar="N|CERTIFICATE|RUN", help=f"A number, a .jsonl file, or the folder of a run. {NUMBER}")],
    output: Annotated[str | None, typer.Option("--output", help="Also a picture: .png, .pdf or .svg (extra `collatz`).")] = None,
    width: Annotated[int | None, typer.Option("--width", min=30, max=1000, help="Characters in a line; default the terminal's.")] = None,
) -> None:
    """Pictures of a trajectory, a certificate or a run. Heights; speed and largest numbers of its blocks; what it has learned."""
    from pathlib import Path

    from treadle.collatz import plots
    from treadle.collatz.arithmetic import number

    if Path(what).is_dir():
        from treadle.collatz_tasks.curves import run_series

        pictures = run_series(what)
    elif what.endswith(".jsonl") or Path(what).is_file():
        pictures = plots.certificate_series(what)
    else:
        pictures = [plots.trajectory_heights(number(what))]
    if output is not None:
        plots.write_picture(pictures, output)
    for series in pictures:
        for text in plots.text_plot(series, width):
            echo(text)
    if output is not None:
        echo(f"picture: {output}")


def _json(found: dict[str, Any]) -> None:
    import json

    echo(json.dumps(found))
