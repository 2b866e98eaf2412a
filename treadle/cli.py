"""The command line: verbs -> functions. Everything heavy is imported inside the verb that needs it."""

from __future__ import annotations

import atexit
import errno
import itertools
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from treadle import cli_projects, cli_serving, completion
from treadle.cli_collatz import collatz_app
from treadle.cli_options import Device, RepetitionPenalty, Run, Temperature, TopK, TopP, Trust, Weights
from treadle.cli_text import convert, data_app, data_prepare, tokenizer_app
from treadle.terminal import columns
from treadle.terminal import write as echo
from treadle.version import __version__

app = typer.Typer(
    help="Train, fine-tune, measure and serve sequence models: exact, resumable, fair to compare.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    # Every verb takes _ for - in its flags, as keys of the configuration do (--max_new_tokens, --prompt_file).
    context_settings={"token_normalize_func": lambda word: word.replace("_", "-"), "help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(collatz_app, name="collatz")
app.command("prepare", hidden=True)(data_prepare)
app.command()(convert)


def _say_version(asked: bool) -> None:
    if asked:
        echo(f"treadle {__version__}")
        raise typer.Exit


@app.callback()
def treadle(
    version: Annotated[bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    pass


# train and check take every key of the configuration as a flag; help.py writes their help from the sections.
OPEN = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}

# What several verbs take.
ModelPath = Annotated[str | None, typer.Option("--model-path", "--checkpoint", help="The same as the argument.")]
Text = Annotated[str | None, typer.Option("--data", "--data-dir", "--data-path", help="Measure on this text instead of the held-out text.")]
Split = Annotated[str, typer.Option(help="Which held-out text: validation or test (--test_fraction).")]
MostRows = Annotated[int | None, typer.Option(min=1, help="At most this many rows, spread over the text.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows in one pass.")]


def _request(arguments: list[str]) -> Any:
    from treadle.errors import ConfigError
    from treadle.settings import Bare, Forgotten, parse_flags
    from treadle.start import Request

    several: dict[str, list[str]] = {"--allow-change": [], "--trust-code": []}  # flags that may be given several times
    examples = {"--allow-change": "a key, as in --allow-change data.seq_len", "--trust-code": "a file, as in --trust-code model.py"}
    rest: list[str] = []
    index = 0
    while index < len(arguments):
        word, _, value = arguments[index].partition("=")
        word = word.replace("_", "-")
        index += 1
        if word not in several:
            rest.append(arguments[index - 1])
            continue
        if not value:
            if index >= len(arguments):
                raise ConfigError(f"{word} needs {examples[word]}")
            value = arguments[index]
            index += 1
        several[word].append(value)
    allow = [key for value in several["--allow-change"] for key in value.split(",")]
    words, flags = parse_flags(rest)
    fresh = flags.pop("fresh", "false").lower() == "true"
    weights = flags.pop("from", None)
    if isinstance(weights, Bare):
        raise Forgotten.of(weights)
    for spelling in ("local-rank", "local_rank"):  # torch.distributed.launch says it by a flag
        if spelling in flags:
            os.environ.setdefault("LOCAL_RANK", flags.pop(spelling))
    if len(words) > 1:
        raise ConfigError(f"one target at a time: {' '.join(words)!r}; several paths go into --data.path a,b")
    return Request(words[0] if words else None, flags, fresh, weights, tuple(allow), trust_code=tuple(several["--trust-code"]))


def _open_verb(verb: str, arguments: list[str]) -> None:
    """`train`, `distill`, `check` and `plan`: their help from the sections, or their function in start.py."""
    if any(word in ("-h", "--help") or word.startswith("--help=") for word in arguments):
        from treadle.help import print_help

        print_help(verb, arguments)
        return
    request = _request(arguments)
    if verb in ("train", "distill"):
        from treadle.start import devices

        count = devices(request)
        if count > 1:
            from treadle.distributed.launch import run_processes

            sys.exit(run_processes(count, [verb, *arguments]))
    if verb == "distill":
        from treadle.distillation import distill as run
    elif verb == "train":
        from treadle.start import train as run
    elif verb == "check":
        from treadle.dry_run import check as run
    else:
        from treadle.dry_run import plan as run
    run(request)


@app.command(context_settings=OPEN)
def train(ctx: typer.Context) -> None:
    """Train a model; the same command again continues it. [RECIPE.toml | FILE.txt | DIR] [--key value ...]"""
    _open_verb("train", ctx.args)


@collatz_app.command("train", context_settings=OPEN)
def collatz_train(ctx: typer.Context) -> None:
    """Learn from trajectories. The same as treadle train collatz, or [collatz_delay | collatz_long_step] [--key value ...]."""
    named = bool(ctx.args) and not ctx.args[0].startswith("-")
    _open_verb("train", ctx.args if named else ["collatz", *ctx.args])


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def sweep(
    ctx: typer.Context,
    over: Annotated[list[str], typer.Option("--over", help="KEY=VALUE,VALUE,...; several times for a grid.")],
    seeds: Annotated[int, typer.Option(min=1, help="Repeat every point with the seeds 0 to N - 1.")] = 1,
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time; they share the cores.")] = 1,
    output: Annotated[str, typer.Option("--output", "--output-dir", help="A folder with one run for each cell.")] = "runs/sweep",
) -> None:
    """Train a grid of settings; one table of the results. [RECIPE.toml | FILE.txt | DIR] --over KEY=A,B [--key value ...]; the same
    command goes on where it stopped."""
    from treadle import sweep as sweeping

    cells = sweeping.run(sweeping.Sweep(ctx.args, sweeping.grid(over), seeds, processes, Path(output)), echo, _request)
    for line in sweeping.lines_of(cells):
        echo(line)
    if (problem := sweeping.unfinished(cells)) is not None:
        raise problem


@app.command(context_settings=OPEN)
def distill(ctx: typer.Context) -> None:
    """Train a student of a trained teacher: --teacher RUN. [RECIPE.toml | FILE.txt | DIR] [--key value ...]"""
    _open_verb("distill", ctx.args)


@app.command(context_settings=OPEN)
def check(ctx: typer.Context) -> None:
    """Try a recipe: one real step; every value and its origin. Nothing is written."""
    _open_verb("check", ctx.args)


@app.command(context_settings=OPEN)
def plan(ctx: typer.Context) -> None:
    """Will it fit, how long will it take: memory, traffic, time. On paper, for --world processes."""
    _open_verb("plan", ctx.args)


@app.command()
def ctl(
    run: Annotated[str, typer.Argument(help="The folder of a run that is being trained.")],
    words: Annotated[list[str], typer.Argument(help="stop, status, save, eval, help, or set KEY=VALUE.")],
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the answer.")] = 60.0,
) -> None:
    """Steer a running training: status, save, eval, set, stop. From any terminal that sees its folder."""
    from treadle.monitor.control import send

    echo(send(Path(run), " ".join(words), timeout))


@app.command("eval")
def evaluate(
    runs: Annotated[list[str] | None, typer.Argument(help="Runs: a folder, a checkpoint, `last`, RUN@best, RUN@STEP.")] = None,
    model_path: ModelPath = None,
    data: Text = None,
    split: Split = "validation",
    rows: MostRows = None,
    samples: Annotated[int, typer.Option("--samples", "--num-samples", min=0, help="Samples to generate and check.")] = 3,
    batch_size: BatchSize = 16,
    stats: Annotated[bool, typer.Option("--stats", help="The architecture's own numbers too (routing, ...).")] = False,
    output: Annotated[str | None, typer.Option("--output", "--output-dir", help="Folder for the results; default RUN/results.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness instead: names, or .yaml files, with commas.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="With --tasks: solved examples before each question.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --tasks: the first so many documents of each.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="With --tasks: tokens of a row; default as the model was made for.")] = None,
    apply_chat_template: Annotated[bool, typer.Option("--apply-chat-template", help="With --tasks: ask through the run's chat template.")] = False,
    weights: Weights = None,
    device: Device = "auto",
    trust_code: Trust = None,
) -> None:
    """How good runs are: loss, bits per byte, accuracy, samples. Beside simple baselines."""
    if tasks is not None:
        from treadle.evaluation import harness

        for run in _runs(runs, model_path):
            report = harness.evaluate_tasks(run, tasks, num_fewshot=num_fewshot, limit=limit, batch_size=batch_size, device=device, weights=weights,
                                            max_length=max_length, apply_chat_template=apply_chat_template, output=output)  # fmt: skip
            for line in harness.lines_of(report):
                echo(line)
        return
    from treadle.evaluation.report import evaluate_run, table_of, write_results
    from treadle.models.huggingface.peft import is_peft
    from treadle.models.huggingface.reading import is_foreign
    from treadle.models.pretrained import home_of

    reports = []
    for run in _runs(runs, model_path):
        reports.append(evaluate_run(run, data, rows, samples, batch_size, device=device, stats=stats, split=split, weights=weights))
        checkpoint = Path(reports[-1]["checkpoint"])
        if output or not (is_foreign(checkpoint) or is_peft(checkpoint)):  # nothing is written into a folder of somebody else's
            write_results(Path(output) if output else home_of(checkpoint) / "results", reports[-1])
    for line in table_of(reports):
        echo(line)
    for report in reports:
        for name, value in report.get("stats", {}).items():
            echo(f"{report['run']}  {name} {value:.4f}")
        for sample in report.get("samples", []):
            echo(f"\n--- {report['run']}, prompt {sample['prompt']!r}\n{sample['prompt']}{sample['text']}")


@app.command()
def compare(
    runs: Annotated[list[str] | None, typer.Argument(help="Runs or checkpoints; RUN@all is each checkpoint of a run.")] = None,
    suite: Annotated[str | None, typer.Option(help="A suite file, or a built-in one (quick, architectures): trains what it compares.")] = None,
    data: Text = None,
    split: Split = "validation",
    rows: MostRows = None,
    batch_size: BatchSize = 16,
    output: Annotated[str | None, typer.Option("--output", "--output-dir", help="A JSON file for the table; of a suite a folder.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="With --suite: runs at a time; default: one for each core.")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="With --suite: run on a Ray cluster (the ray extra).")] = False,
    device: Device = "auto",
    trust_code: Trust = None,
) -> None:
    """Several runs or checkpoints on the same text, in one table. Bits per byte, accuracy, parameters, FLOPs, decoding state.
    With --suite several architectures are trained under one budget first; the same command goes on where it stopped."""
    if suite is not None or ray or workers is not None or not runs:
        from treadle.suite.command import compare_suite

        compare_suite(suite, runs, output, workers, ray)
        return
    from treadle.monitor.records import write_json
    from treadle.reporting import compare as comparing

    table = comparing.compare(runs, data, split, rows, batch_size, device)
    for line in comparing.lines_of(table, columns(sys.stdout)):
        echo(line)
    if output is not None:
        write_json(Path(output), {"rows": table})


def _runs(runs: list[str] | None, model_path: str | None) -> list[str]:
    """The runs of the argument, or the one of --model-path; ConfigError for both or none."""
    from treadle.errors import ConfigError

    if (runs is None or runs == []) == (model_path is None):
        raise ConfigError("name a run once, as in treadle eval RUN (or --model_path RUN); `last` is the newest one; "
                          "treadle eval --help says the rest")  # fmt: skip
    return runs or [str(model_path)]


@app.command()
def generate(
    run: Annotated[str | None, typer.Argument(help="A run, a checkpoint, `last` (the default), RUN@best or RUN@STEP.")] = None,
    model_path: ModelPath = None,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    prompt_file: Annotated[str | None, typer.Option(help="A file with one prompt a line.")] = None,
    output_file: Annotated[str | None, typer.Option(help="Where the continuations of --prompt-file go.")] = None,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Ask for prompts; /help there.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "--max-tokens", min=1, help="Tokens to write; default 100.")
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: RepetitionPenalty = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="The same as --temperature 0.")] = False,
    num_samples: Annotated[int, typer.Option(min=1, help="Continuations of each prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    stop: Annotated[str | None, typer.Option(help="End where this text would come.")] = None,
    show_chunks: Annotated[bool, typer.Option("--show-chunks", help="Colour the text by learned chunks (hnet).")] = False,
    weights: Weights = None,
    speculative: Annotated[str | None, typer.Option(help="ngram: guess tokens from the text so far, for speed; the same outcome.")] = None,
    draft: Annotated[str | None, typer.Option(help="A smaller run with the same tokenizer that guesses, for speed; the same outcome.")] = None,
    device: Device = "auto",
    trust_code: Trust = None,
) -> None:
    """Let a trained model continue text. A generation_config.json beside the weights or in the run has other defaults."""
    from treadle.errors import ConfigError
    from treadle.generation.sampling import Sampling, check_seed, typed_over

    if show_chunks and (prompt_file is not None or interactive or num_samples > 1):
        raise ConfigError("--show-chunks shows one continuation of --prompt; leave the other ways of asking out")
    if sum((prompt is not None, prompt_file is not None, interactive)) > 1:
        raise ConfigError("--prompt, --prompt-file and --interactive exclude one another; keep one")
    if output_file is not None and prompt_file is None:
        raise ConfigError("--output-file is where the continuations of --prompt-file go; for one prompt write > FILE behind the command")
    check_seed(seed)
    typed = {"max_new_tokens": max_new_tokens, "temperature": 0.0 if greedy else temperature, "top_k": top_k, "top_p": top_p,
             "repetition_penalty": repetition_penalty}  # fmt: skip
    Sampling(**typed_over({}, typed)[0])  # what is wrong with it is said before a model is loaded
    from treadle.generation.session import Session
    from treadle.models.pretrained import generation_defaults, load_run, tokenizer_of
    from treadle.models.quantized import quantize_once

    loaded = load_run(_runs([run or "last"] if run or not model_path else None, model_path)[0], device)
    if (run or model_path or "last") == "last":
        echo(f"last is {loaded.checkpoint.folder}", sys.stderr)
    tokenizer = tokenizer_of(loaded)
    sampling, count = typed_over(generation_defaults(loaded.checkpoint.folder), typed)
    session = Session(loaded.model, tokenizer, Sampling(**sampling), count, seed, stop, weights=quantize_once(loaded, weights),
                      speculative=speculative, draft=load_run(draft, device).model if draft is not None else None)  # fmt: skip

    def write(text: str) -> None:
        echo(text, end="")

    if show_chunks:
        from treadle.generation.chunks import coloured

        for line in coloured(loaded.model, tokenizer, (prompt or "") + session.say(prompt or "\n")):
            echo(line, exact=True)
    elif interactive:
        session.interactive(input, write)
    elif prompt_file is not None:
        session.run_file(prompt_file, output_file, num_samples, write)
    else:
        for number in range(num_samples):
            session.write_on(prompt, number, write)
            write("\n" if number + 1 == num_samples else "\n\n---\n\n")


app.command("chat")(cli_serving.chat)
app.command("serve")(cli_serving.serve)
app.command("report")(cli_projects.report)
app.command("watch")(cli_projects.watch)


@app.command()
def export(
    run: Run = "last",
    output: Annotated[str | None, typer.Option(help="The folder to write; default RUN/export.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16: how the weights are stored.")] = "fp32",
    packed: Annotated[bool, typer.Option("--packed", help="Store ternary weights in 1.6 bits each; the same outputs.")] = False,
    quantize: Annotated[str | None, typer.Option(help="int8 or int4: store linear layers' weights in so many bits.")] = None,
    layout: Annotated[str | None, typer.Option("--format", help="treadle (the default); huggingface, what transformers loads, in RUN/huggingface; gguf, for llama.cpp, in RUN/gguf; or peft, adapters alone (the default where a run has some), in RUN/peft.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write the whole model of a run with adapters.")] = False,
    gguf_type: Annotated[str | None, typer.Option(help="f32 (the default), f16 or q8_0: the numbers of a .gguf file.")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="What the model card states, as in apache-2.0.")] = None,
    trust_code: Trust = None,
) -> None:
    """The weights of a run as one folder that others can load. config.json, model.safetensors, the tokenizer and a model card;
    shards are joined."""
    from treadle.models.export import export as write
    from treadle.models.export import told

    written = write(run, output, precision, packed, layout=layout, quantize=quantize, gguf_type=gguf_type, license=licence, merge=merge)
    for line in told(written, layout, precision, packed, quantize):
        echo(line)


@app.command()
def models(
    preset: Annotated[str | None, typer.Option(help="One preset: its shape and the training values that go with it.")] = None,
) -> None:
    """The architectures and their presets, with parameter counts."""
    from treadle.models.base import count_label, parameter_count
    from treadle.models.catalogue import MODELS

    if preset is not None:
        from treadle.help import preset_lines

        for line in preset_lines(preset):
            echo(line)
        return

    for name in MODELS.names():
        cls = MODELS.get(name)
        echo(f"{name}: {(cls.__doc__ or '').strip().splitlines()[0]}")
        for preset in cls.Config.presets():
            count = parameter_count(cls, cls.Config.with_preset(preset))
            echo(f"    {preset:<14}{count_label(count):>7} parameters (random until trained)")
    echo("choose with --model.arch NAME --model.preset PRESET (what goes with it: treadle models --preset PRESET); keys: "
         "treadle train --model.arch NAME --help model")  # fmt: skip


@app.command()
def recipes() -> None:
    """The built-in recipes."""
    from treadle.recipe import builtin_recipes

    for name, path in builtin_recipes().items():
        head = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
        first, *_ = re.split(r"(?<=\.) (?=[A-Z])", " ".join(line.lstrip("# ") for line in head))
        echo(f"{name:<30}{first}")
    echo("run one with: treadle train NAME")


@app.command()
def doctor(
    run: Annotated[
        str | None, typer.Argument(help="A run folder to verify; without it the machine is checked.")
    ] = None,
) -> None:
    """Check this machine, or every checkpoint of a run."""
    from treadle import examine

    lines, healthy = examine.run(run) if run else examine.machine()
    for line in lines:
        echo(line)
    if not healthy:
        raise typer.Exit(65)


def _rank() -> str:
    """ "rank 1: " before the errors of one of several processes."""
    from treadle.distributed.environment import detect
    from treadle.errors import ConfigError

    try:
        launch = detect()
    except ConfigError:
        return ""
    return f"rank {launch.rank}: " if launch.size > 1 else ""


def main() -> None:
    """The entry point: one clear line and an exit code for every expected error."""
    several = bool(_rank())
    if several:
        from treadle.distributed.environment import quiet

        quiet()
    code = _run()
    if several:
        # At the end of the interpreter a daemon thread inside torch's C++ is unwound by force, which aborts the process
        # (seen at the end of one of some hundred runs on a loaded machine). All work is done and closed by here.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run() -> int:
    from treadle.errors import PeerFailed, Stopped, TreadleError

    try:
        if completion.answers(lambda: typer.main.get_command(app)):
            return 0
        ended = app(prog_name="treadle", standalone_mode=False)
        return ended if isinstance(ended, int) else 0
    except typer.Abort:
        return 130
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except TreadleError as problem:
        if not isinstance(problem, (Stopped, PeerFailed)):  # said already, by this process or by another
            echo(f"{_rank()}error: {problem}", sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as problem:
        full = problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "free some space or write elsewhere with --output_dir" if full else "check the path and its permissions"
        echo(f"{_rank()}error: {problem}; {hint}, then run the same command again", sys.stderr)
        return 74 if full else 2
    except Exception as problem:
        # What was typed wrongly. Its class is click's or typer's own copy of it, whichever this version of typer brings.
        if hasattr(problem, "format_message") and hasattr(problem, "exit_code"):
            from treadle.help import said_of_usage

            said = said_of_usage(problem)
            echo(said if said.startswith("Usage:") else f"error: {said}", sys.stderr)
            return int(problem.exit_code)
        echo(traceback.format_exc(), sys.stderr, end="")  # a defect; what it quotes may be anything
        return 1
    return 0
