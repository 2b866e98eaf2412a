"""Arguments and options that several verbs of the command line take, written once."""

from __future__ import annotations

from typing import Annotated

import typer

from treadle import trusted_code

Run = Annotated[str, typer.Argument(help="A run, a checkpoint, `last`, RUN@best or RUN@STEP; a Hugging Face folder, .gguf or name.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Weights = Annotated[str | None, typer.Option(help="Linear layers' weights in fp32, bf16, int8 or int4; default fp32, of a quantised export its own.")]

# How tokens are drawn.
Temperature = Annotated[float | None, typer.Option(help="Lower is safer, higher is wilder, 0 is greedy; default 1.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the K likeliest tokens; 0 is off; default 50.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that together have this probability; default 0.9.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1: repeat less; default 1.")]

# Of every verb that may load a file of code.
Trust = Annotated[
    list[str] | None,
    typer.Option("--trust-code", "--trust_code", metavar="FILE.py", callback=lambda files: trusted_code.allow(files or ()),
                 help="A Python file that a run from elsewhere names, and may execute."),
]  # fmt: skip
