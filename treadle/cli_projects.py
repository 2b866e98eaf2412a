"""The verbs that look at finished or running work: `treadle report`, `treadle watch`. Everything heavy is imported inside the verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli_options import Trust
from treadle.terminal import write as echo


def report(
    runs: Annotated[list[str], typer.Argument(help="Folders of runs, of a sweep or of a suite; `last` is the newest run.")],
    output: Annotated[str | None, typer.Option(help="The HTML file to write; default report.html in the first folder.")] = None,
    no_model: Annotated[bool, typer.Option("--no-model", help="Load no checkpoint: no coloured text.")] = False,
    trust_code: Trust = None,
) -> None:
    """Runs as one HTML page: curves, samples, differences. It needs no network and no server."""
    from treadle.reporting.report import write_report

    for line in write_report(runs, Path(output) if output is not None else None, model=not no_model):
        echo(line)


def watch(
    run: Annotated[str, typer.Argument(help="The folder of a run, of a sweep, of a suite, or one that holds some; `last` is the newest in runs/.")] = "last",
    host: Annotated[str, typer.Option(help="The address to listen at; any but this machine's own needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where it listens; 0: any free port.")] = 8001,
    token: Annotated[str | None, typer.Option(help="What the page asks for; better in TREADLE_TOKEN, where no list of processes shows it.")] = None,
    token_file: Annotated[str | None, typer.Option(help="A file with the token in its first line.")] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="The page only shows: no stop, save, eval or set.")] = False,
) -> None:
    """A page that follows and steers what is running. At http://127.0.0.1:8001; Ctrl-C ends it."""
    from treadle.live.desk import Desk
    from treadle.live.server import serve
    from treadle.live.watched import Watched, found
    from treadle.serving.sockets import entrance

    folder = found(run)
    listener, address, secret = entrance(host, port, token, token_file)
    echo(f"{folder} at {address}; Ctrl-C ends the page, not the training")
    raise typer.Exit(serve(Desk(Watched(folder), secret, read_only), listener))
