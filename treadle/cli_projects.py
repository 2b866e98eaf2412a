"""The verbs that look at finished or running work: `treadle report`. Everything heavy is imported inside the verb."""

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
    """One HTML file that shows runs: curves, samples, text by its loss, settings, events. It needs no network and no server."""
    from treadle.reporting.report import write_report

    for line in write_report(runs, Path(output) if output is not None else None, model=not no_model):
        echo(line)
