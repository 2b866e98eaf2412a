"""The verbs for those who use a model: `treadle chat` and `treadle serve`. Everything heavy is imported inside the verb."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from treadle.cli_options import Device, RepetitionPenalty, Run, Temperature, TopK, TopP, Trust, Weights
from treadle.terminal import write as echo

if TYPE_CHECKING:
    from treadle.serving.limits import Limits

Template = Annotated[
    str | None, typer.Option("--chat-template", help="chatml, llama3, plain or FILE.jinja; default the run's own, where it has one.")
]


def _loaded(run: str, device: str, weights: str | None, chat_template: str | None) -> tuple[Any, Any, Any, str]:
    """(what was loaded, its tokenizer, its chat template or None, what its weights are read in)."""
    from treadle.models.pretrained import load_run, tokenizer_of
    from treadle.models.quantized import quantize_once
    from treadle.text.chat_template import ChatTemplate

    template = ChatTemplate.named(chat_template) if chat_template is not None else None  # what is wrong with it is said first
    loaded = load_run(run, device)
    tokenizer = tokenizer_of(loaded)
    return loaded, tokenizer, template or tokenizer.chat_template, quantize_once(loaded, weights)


def chat(
    run: Run = "last",
    chat_template: Template = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", "--max-tokens", min=1, help="Most tokens of an answer; default 512.")] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Annotated[int, typer.Option(help="The same seed and words give the same conversation.")] = 0,
    weights: Weights = None,
    device: Device = "auto",
    trust_code: Trust = None,
) -> None:
    """Talk to a trained model in the terminal. /help lists the commands, Ctrl-C ends an answer."""
    from treadle.generation.sampling import Sampling, typed_over

    typed = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
             "repetition_penalty": repetition_penalty}  # fmt: skip
    Sampling(**typed_over({}, typed)[0])  # what is wrong with it is said before a model is loaded
    from treadle.files import cache_root
    from treadle.models.pretrained import generation_defaults
    from treadle.serving.chat import Conversation, history

    loaded, tokenizer, template, read_in = _loaded(run, device, weights, chat_template)
    sampling, count = typed_over({"max_new_tokens": 512, **generation_defaults(loaded.checkpoint.folder)}, typed)
    conversation = Conversation(loaded.model, tokenizer, Sampling(**sampling), count, seed, template, system, weights=read_in)
    with history(cache_root(None) / "chat_history"):
        conversation.interactive(input, lambda text: echo(text, end=""))


def serve(
    run: Run = "last",
    host: Annotated[str, typer.Option(help="The address to listen at; any but this machine's own needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where it listens; 0: any free port.")] = 8000,
    token: Annotated[str | None, typer.Option("--token", "--api-key", help="What clients send as their API key; better in TREADLE_TOKEN, where no list of processes shows it.")] = None,
    token_file: Annotated[str | None, typer.Option(help="A file with the token in its first line.")] = None,
    name: Annotated[str | None, typer.Option("--name", "--served-model-name", help="What the model is called; default the folder's name.")] = None,
    chat_template: Template = None,
    rows: Annotated[int, typer.Option("--rows", "--max-num-seqs", min=1, help="Requests that share a forward pass.")] = 16,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Longest prompt; default 2048.")] = None,
    max_model_len: Annotated[int | None, typer.Option(min=2, help="Prompt and answer together, where no longest prompt is said.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "--max-tokens", min=1, help="Most tokens of an answer.")] = 512,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are told to come back (429).")] = 256,
    weights: Weights = None,
    device: Device = "auto",
    trust_code: Trust = None,
) -> None:
    """A trained model behind OpenAI's API, with a page to talk to it. At http://127.0.0.1:8000; Ctrl-C finishes what runs."""
    from treadle.serving.limits import Limits, longest
    from treadle.serving.server import needed
    from treadle.serving.sockets import entrance

    needed()
    max_prompt_tokens, max_new_tokens = longest(max_prompt_tokens, max_new_tokens, max_model_len)
    listener, address, secret = entrance(host, port, token, token_file)  # before a model is loaded: a port that is taken is said at once
    try:
        code = _serve(listener, address, secret, run, name, rows, Limits(max_prompt_tokens, max_new_tokens, min(Limits.max_choices, queue)), queue,
                      _loaded(run, device, weights, chat_template))  # fmt: skip
    finally:
        listener.close()
    raise typer.Exit(code)


def _serve(listener: Any, address: str, token: str | None, run: str, name: str | None, rows: int, limits: Limits, queue: int,
           loaded: tuple[Any, Any, Any, str]) -> int:  # fmt: skip
    """What was loaded, behind a socket -> the exit code."""
    from treadle.generation.engine import Engine
    from treadle.generation.sampling import Sampling, typed_over
    from treadle.live.desk import Desk
    from treadle.live.watched import Watched
    from treadle.models.pretrained import generation_defaults, home_of
    from treadle.reporting.run_data import is_run
    from treadle.serving.app import App
    from treadle.serving.chunk_marks import ChunkMarks
    from treadle.serving.protocol import Served
    from treadle.serving.server import serve

    found, tokenizer, template, read_in = loaded
    folder = found.checkpoint.folder
    defaults = generation_defaults(folder)
    Sampling(**typed_over(defaults, {})[0])  # what is wrong in a generation_config.json is said here, not to each client
    engine = Engine(found.model, rows=rows, max_len=limits.max_len, weights=read_in, queue=queue)
    limits = limits.within(engine.max_len)
    place = folder.resolve()
    called = name or (home_of(folder).name if place.parent.name == "checkpoints" else place.stem if place.is_file() else place.name)
    served = Served(called, tokenizer, found.model.vocab_size, limits, template, defaults)
    home = home_of(folder)
    live = Desk(Watched(home), token) if is_run(home) else None
    app = App(engine, served, token=token, marks=ChunkMarks.of_model(found.model, tokenizer), fingerprint=f"treadle-{read_in}",
              created=int(folder.stat().st_mtime), live=live)  # fmt: skip
    engine.start()
    echo(f"{called} at {address} (a page to talk to it{', /run follows its training' if live is not None else ''}) and {address}/v1 (OpenAI's API; {'with' if token else 'without'} a token); "
         f"prompts of {limits.max_prompt_tokens} tokens, answers of {limits.max_new_tokens}, {rows} at once; Ctrl-C ends it")  # fmt: skip
    try:
        return serve(app, listener)
    finally:
        engine.stop(finish=False)
