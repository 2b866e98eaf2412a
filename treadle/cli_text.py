"""The verbs of text: `treadle data ...` and `treadle tokenizer ...`. Everything heavy is imported inside the verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli_options import Trust
from treadle.terminal import write as echo

data_app = typer.Typer(help="Prepare text and look at it.", no_args_is_help=True, rich_markup_mode=None)
tokenizer_app = typer.Typer(help="Train tokenizers and look at them.", no_args_is_help=True, rich_markup_mode=None)



@data_app.command("prepare")
def data_prepare(
    path: Annotated[
        str,
        typer.Argument(help="A text, JSONL or parquet file, or a folder of them; `austen` ships along, `tinystories` is fetched."),
    ],
    output: Annotated[str | None, typer.Option("--output", "--output-dir", help="The folder to write; default the cache.")] = None,
    tokenizer: Annotated[str, typer.Option(help="auto, byte, bpe, wordpiece, unigram, char, or a path.")] = "auto",
    vocab_size: Annotated[int, typer.Option(help="Size of a tokenizer trained here.")] = 2048,
    text_column: Annotated[str, typer.Option(help="The column that holds the text.")] = "text",
    document_separator: Annotated[str | None, typer.Option(help="A line that ends a document in .txt.")] = None,
    validation_fraction: Annotated[float, typer.Option(min=0, max=0.99, help="Share of the text held out for evaluation.")] = 0.05,
    test_fraction: Annotated[float, typer.Option(min=0, max=0.99, help="Share held out beside it for a last test.")] = 0.05,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Read this many documents at most.")] = None,
    seq_len: Annotated[int, typer.Option("--seq-len", "--max-seq-length", min=2, help="Tokens in a row, for counting them.")] = 256,
    min_length: Annotated[int, typer.Option(min=0, help="Leave out documents with fewer tokens.")] = 0,
    on_bad: Annotated[str, typer.Option(help="skip or error: what a malformed line does.")] = "skip",
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 is one for each core.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Prepare again, whatever is there.")] = False,
    shard: Annotated[str | None, typer.Option(help="I/N: only the pieces of process I (from 0) of N.")] = None,
    trust_code: Trust = None,
) -> None:
    """Tokenise text once, in parallel; again continues it. Prints statistics.

    Several machines share the work with --shard 0/4 to --shard 3/4 and one --output that all see; the same command
    without --shard then verifies the pieces and joins them.
    """
    from treadle.data import summary
    from treadle.errors import ConfigError

    settings = summary.settings(
        path, text_column=text_column, document_separator=document_separator, validation_fraction=validation_fraction,
        test_fraction=test_fraction, max_samples=max_samples, seq_len=seq_len, min_length=min_length, on_bad=on_bad,
        preparation_workers=workers or "auto",
    )  # fmt: skip
    if shard is not None and fresh:
        raise ConfigError("--fresh would delete what the other shards have made; delete the folder before the first shard")
    if shard is not None:
        lines = summary.prepare_part(settings, tokenizer, vocab_size, output, shard, echo)
    else:
        lines = summary.prepare_text(settings, tokenizer, vocab_size, output, fresh, echo)
    for line in lines:
        echo(line)


Streaming = Annotated[bool, typer.Option("--streaming", help="Read it as a stream: nothing is prepared, whatever its size.")]
Text = Annotated[str, typer.Argument(help="Text, or a folder that `data prepare` wrote.")]
Packing = Annotated[str, typer.Option(help="concat, next_fit, first_fit, best_fit or none.")]
TokenizerName = Annotated[str, typer.Option(help="auto, byte, bpe, ..., or a path.")]
Column = Annotated[str, typer.Option(help="The column that holds the text.")]
Kind = Annotated[str, typer.Option(help="text, conversations or preferences; auto looks at the first row.")]
Template = Annotated[str, typer.Option("--chat-template", "--chat_template", help="auto, chatml, llama3, plain, none or a .jinja file.")]
TrainOn = Annotated[str, typer.Option("--train-on", "--train_on", help="assistant, completion or all: what is learnt of conversations.")]


@data_app.command("stats")
def data_stats(
    path: Text,
    tokenizer: TokenizerName = "auto",
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a row.")] = 256,
    text_column: Column = "text",
    streaming: Streaming = False,
    dataset: Kind = "auto",
    chat_template: Template = "auto",
    train_on: TrainOn = "assistant",
    trust_code: Trust = None,
) -> None:
    """Documents, bytes, tokens, lengths, how full packings are. Of a stream: in a sample of it."""
    from treadle.data import conversation_viewing, viewing
    from treadle.data.settings import TEXT

    kind = conversation_viewing.kind_of_rows(path, text_column) if dataset == "auto" and not streaming else dataset
    if kind not in ("auto", TEXT):
        keys = {"seq_len": seq_len, "text_column": text_column, "chat_template": chat_template, "train_on": train_on}
        for line in conversation_viewing.statistics(path, kind, tokenizer, **keys):
            echo(line)
        return
    for line in viewing.statistics(path, tokenizer, seq_len, text_column, streaming):
        echo(line)


@data_app.command("show")
def data_show(
    path: Text,
    row: Annotated[int, typer.Option(min=0, help="Which row.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="How many rows, from that one on.")] = 1,
    packing: Packing = "concat",
    tokenizer: TokenizerName = "auto",
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens in a row; 64, of conversations 512.")] = None,
    text_column: Column = "text",
    streaming: Streaming = False,
    dataset: Kind = "auto",
    chat_template: Template = "auto",
    train_on: TrainOn = "assistant",
    trust_code: Trust = None,
) -> None:
    """Training rows as they reach the model. Each document's tokens and text, and which positions predict nothing."""
    import sys

    from treadle.data import conversation_viewing, viewing
    from treadle.data.settings import TEXT
    from treadle.terminal import is_terminal

    colour = is_terminal(sys.stdout)
    kind = conversation_viewing.kind_of_rows(path, text_column) if dataset == "auto" and not streaming else dataset
    if kind not in ("auto", TEXT):
        keys = {"seq_len": seq_len or 512, "packing": packing, "text_column": text_column, "chat_template": chat_template, "train_on": train_on}
        for line in conversation_viewing.show_rows(path, kind, row, rows, tokenizer, colour, **keys):
            echo(line, exact=colour and conversation_viewing.LEARNT in line)
        return
    for line in viewing.show_rows(path, row, rows, packing, tokenizer, seq_len or 64, text_column, streaming, colour):
        echo(line, exact=colour and viewing.MASKED in line)


@data_app.command("check")
def data_check(
    path: Text,
    packing: Packing = "best_fit",
    tokenizer: TokenizerName = "auto",
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a row.")] = 256,
    text_column: Column = "text",
    chat_template: Template = "auto",
    trust_code: Trust = None,
) -> None:
    """Decode every row back and compare it with the text. Read as a stream, so of any size."""
    from treadle.data import conversation_viewing, viewing
    from treadle.data.settings import TEXT

    if (kind := conversation_viewing.kind_of_rows(path, text_column)) != TEXT:
        keys = {"seq_len": seq_len, "packing": packing, "text_column": text_column, "chat_template": chat_template}
        for line in conversation_viewing.check(path, kind, tokenizer, **keys):
            echo(line)
        return
    for line in viewing.check(path, tokenizer, seq_len, packing, text_column, echo):
        echo(line)


@tokenizer_app.command("train")
def tokenizer_train(
    path: Annotated[str, typer.Argument(help="A text, JSONL or parquet file, or a folder of them.")],
    output: Annotated[str, typer.Option(help="The folder to write.")] = "tokenizer",
    kind: Annotated[str, typer.Option(help="bpe, wordpiece, unigram or char.")] = "bpe",
    vocab_size: Annotated[int, typer.Option(min=257, help="Number of tokens.")] = 2048,
    text_column: Annotated[str, typer.Option(help="The column that holds the text.")] = "text",
    train_bytes: Annotated[int, typer.Option(min=1, help="Read at most this much text.")] = 20_000_000,
) -> None:
    """Train a tokenizer on text."""
    from treadle.data.prepare import training_texts
    from treadle.data.sources import open_source
    from treadle.text.base import Tokenizer

    made = Tokenizer.train(kind, training_texts(open_source(path, text_column), (0.0, 0.0), train_bytes), vocab_size)
    made.save(output)
    echo(f"{made.kind} tokenizer of {made.vocab_size} tokens written to {output}; "
               f"use it with --tokenizer.name {output}")  # fmt: skip


@tokenizer_app.command("show")
def tokenizer_show(
    tokenizer: Annotated[str, typer.Argument(help="byte, a tokenizer folder or file, or a run folder.")],
    text: Annotated[str, typer.Option(help="Text to split.")] = "The treadle turned; she smiled.",
    trust_code: Trust = None,
) -> None:
    """What a tokenizer makes of a text."""
    from treadle.text.base import Tokenizer

    inside = Path(tokenizer) / "tokenizer"
    made = Tokenizer.load(inside if inside.is_dir() else tokenizer)
    ids = made.encode(text)
    echo(f"{made.kind}, {made.vocab_size} tokens, end of document {made.eos_id}")
    echo(f"{len(text.encode())} bytes -> {len(ids)} tokens")
    for token in ids.tolist():
        echo(f"{token:>8}  {made.decode([token])!r}")


def convert(
    file: Annotated[str, typer.Argument(help="Another trainer's configuration: a .py of constants (read, never run), .json, .yaml or .toml.")],
    output: Annotated[str | None, typer.Option("--output", "-o", help="The recipe to write; without it, it is printed.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="shc, bytes, complexity, llm_trainer, collatz, huggingface, litgpt, nanogpt or recipe; default what it looks like.")
    ] = None,
) -> None:
    """Another trainer's configuration as a recipe. What has no equivalent is said, and stands at its top."""
    import sys

    from treadle.convert import command

    made = command.convert(Path(file), kind)
    for line in made.said:
        echo(line, sys.stderr)
    if output is None:
        echo(made.text, end="")
        return
    command.write(made, Path(output))
    echo(f"{output} written; try it: treadle check {output}")
