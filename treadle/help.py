"""`treadle train --help`: the keys people use, one section, or every key, from the sections' own documentation."""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

from treadle import trusted_code
from treadle.errors import ConfigError
from treadle.models.catalogue import MODELS
from treadle.recipe import SECTION_ALIASES, Layer, compose, typed_layers, vocabulary
from treadle.registry import nearest
from treadle.settings import Settings, describe_type, parse_flags, plain
from treadle.training.config import DEFAULT_ARCHITECTURE, SECTIONS

INTRODUCTION = {
    "train": """treadle train [RECIPE.toml | FILE.txt | DIR] [--key value ...]

Trains a model; the same command again continues it. Without an argument: the built-in recipe on the bundled text.
A key works without its section where it is unambiguous: --max_steps 100 is --train.max_steps 100.
To fine-tune: treadle train CONVERSATIONS.jsonl --from RUN --objective sft [--lora_rank 8]; docs/fine_tuning.md says more.

  --fresh             start anew in a new folder
  --from RUN          start from the weights of another run, a Hugging Face folder, a .gguf file or a name of the hub
  --allow-change KEY  go on although KEY (or section) differs from what the run was started with
  --trust-code FILE   let a recipe or run that names FILE.py:CLASS execute FILE.py (a name typed here needs no flag)
""",
    "plan": """treadle plan [RECIPE.toml | FILE.txt | DIR] [--world N] [--parallel ddp | fsdp] [--key value ...]

Memory of one process by kind, bytes it sends in a step, time, and estimated scaling, before anything is started.

  treadle plan --memory 12GiB --recommend      the largest preset that trains there, and the command to type
  treadle plan --table                         sizes against memories of 8 to 80 GB, training and generating

  --world N           processes (default parallel.world_size, run.devices, or 1)
  --memory SIZE       say whether it fits in this much for one process, as in 80GiB
  --exact             trace the whole model instead of two and three of its repeating blocks
  --recommend         search presets, row length, precision, checkpointing and rows for --memory; what is typed stays
  --table             the presets of --model.arch against common memories
  --inference         plan generating instead of training; --weights bf16 | int8 | int4: in fewer bits
  --tokens N          hours that so many tokens take; --hours N: tokens in so many hours
  --gpu H100          take that GPU's data sheet, times --utilisation (default 0.4)
  --measure           run a micro-batch of one and two blocks here and take its speed
  --flops N           operations a second that one device reaches (default: measured on this machine's CPU)
  --bandwidth N       bytes a second between processes (default 10e9)
  --overlap SHARE     share of the computing that communication hides behind (default 0.5)
  --rehearse          run one step of process 0 of N under fsdp, over tensors without contents
  --json              the numbers as JSON
""",
    "distill": """treadle distill --teacher RUN [RECIPE.toml | FILE.txt | DIR] [--key value ...]

Trains a student of a trained teacher in stages, then compares the two; the same command again continues it. Shape,
tokenizer and data are the teacher's where nothing else is said; the student is a state-space model (--model.arch ssm).

  --teacher RUN       a run, a checkpoint, or an exported folder
  --stages LIST       mixer,logits (default), mixer,hidden,logits, or logits alone for any architecture
  --max_steps N       steps of all stages together
""",
    "check": """treadle check [RECIPE.toml | FILE.txt | DIR] [--key value ...]

Parses, builds and runs one real micro-step without writing a run; prints every value and where it comes from.
""",
}
# What most runs need; the rest is one word further.
SHAPE = ["model.arch", "model.preset", "data.seq_len", "train.per_device_train_batch_size", "train.gradient_accumulation_steps",
         "train.precision", "train.gradient_checkpointing", "optim.name", "parallel.mode", "run.device"]  # fmt: skip
USUAL = ["run.run_name", "run.output_dir", "run.seed", "run.device", "run.devices", "model.arch", "model.preset", "data.path",
         "data.seq_len", "tokenizer.name", "train.max_steps", "train.num_train_epochs", "train.per_device_train_batch_size",
         "train.gradient_accumulation_steps", "train.precision", "train.gradient_checkpointing", "optim.learning_rate",
         "optim.warmup_steps", "parallel.mode", "eval.eval_steps", "checkpoint.save_steps", "log.report_to"]  # fmt: skip
KEYS = {"train": USUAL, "check": USUAL, "plan": SHAPE, "distill": [key for key in USUAL if key != "model.preset"]}
CLEARER = {"parallel.mode": "parallel", "data.path": "data.path"}  # than --mode and --path, which work as well
# The two keys that choose a model belong to no section's class.
CHOICES = {"model.arch": f"The architecture (default {DEFAULT_ARCHITECTURE}); treadle models lists them.",
           "model.preset": "A published shape of it, as in --model.preset gpt2; treadle models lists them."}  # fmt: skip


def section_lines(name: str, cls: type[Settings], of: str = "") -> list[str]:
    """Help lines of one section: key, type, default, meaning, other names."""
    lines = [f"[{name}] {of}{(cls.__doc__ or '').strip().splitlines()[0]}"]
    return [*lines, *(line for key in cls.model_fields for line in key_lines(name, cls, key))]


def key_lines(name: str, cls: type[Settings], key: str, flag: str | None = None) -> list[str]:
    """Help lines of one key, as `flag` where a shorter name will do."""
    info = cls.model_fields[key]
    default = info.get_default(call_default_factory=True)
    shown = "" if default is None else f", default {default!r}"
    meaning = re.sub(r"\s+", " ", cls.meaning(key))
    aliases = cls.key_info(key)["aliases"]
    if aliases:
        meaning += f" Also: {', '.join(aliases)}."
    wrapped = textwrap.wrap(meaning, 100, initial_indent="        ", subsequent_indent="        ")
    return [f"  --{flag or f'{name}.{key}'}  ({describe_type(info.annotation)}{shown})", *wrapped]


def usual_lines(keys: list[str]) -> list[str]:
    """One entry for each of a few keys, by the shortest name that is understood."""
    unique = Counter(key for cls in SECTIONS.values() for key in cls.model_fields)
    lines = []
    for dotted in keys:
        name, _, key = dotted.partition(".")
        if dotted in CHOICES:
            lines += [f"  --{dotted} NAME", f"        {CHOICES[dotted]}"]
        else:
            lines += key_lines(name, SECTIONS[name], key, CLEARER.get(dotted, key if unique[key] == 1 else dotted))
    return lines


def print_help(verb: str, arguments: list[str]) -> None:
    """What follows --help says how much: nothing (the keys people use), a section or a key, or `all`. With --model.arch
    NAME also that architecture's keys, which imports torch. ConfigError for a word that is none of these."""
    place = next(i for i, word in enumerate(arguments) if word in ("-h", "--help") or word.startswith("--help="))
    after = arguments[place + 1 :]
    words = after[: next((i for i, word in enumerate(after) if word.startswith("-")), len(after))]
    asked = [word for word in (arguments[place].partition("=")[2], *words) if word]
    targets, flags = parse_flags(arguments[:place] + after[len(words) :])
    arch = flags.get("model.arch") or flags.get("arch")
    if not asked:
        print(INTRODUCTION[verb])
        print("\n".join(usual_lines(KEYS[verb])) + "\n")
        if arch is not None:
            print("\n".join(_model_lines(arch)) + "\n")
        print(_further(verb))
    elif [plain(word) for word in asked] == ["all"]:
        print(INTRODUCTION[verb])
        for name, cls in SECTIONS.items():
            print("\n".join(section_lines(name, cls)) + "\n")
        print("\n".join(_model_lines(arch or DEFAULT_ARCHITECTURE)) + "\n\n" + OTHERS)
    else:
        for word in asked:
            print("\n".join(_asked_lines(word, arch or DEFAULT_ARCHITECTURE, targets[:1])) + "\n")


OTHERS = "The keys of another architecture: treadle train --model.arch NAME --help model (treadle models lists them)."


def _further(verb: str) -> str:
    count = sum(len(cls.model_fields) for cls in SECTIONS.values())
    return (f"These are the {len(KEYS[verb])} keys that most runs need, of {count} and the architecture's own.\n"
            f"  treadle {verb} --help all        every key\n"
            f"  treadle {verb} --help SECTION    one section: {', '.join(['model', *SECTIONS])}\n"
            f"  treadle {verb} --help KEY        one key\n{OTHERS}")  # fmt: skip


def _model_lines(arch: str) -> list[str]:
    trusted_code.allow_names(arch)  # typed
    return section_lines("model", MODELS.get(arch).Config, f"of {arch}: ")


def _task_lines(targets: list[str], word: str = "") -> list[str]:
    """The keys of the task that a recipe or a file of one's own holds, or the one that is called `word`."""
    if not targets:
        return []
    from treadle.objectives.task import task_class

    recipe = compose(typed_layers(targets[0], Layer({}, "flag"), True))
    task = task_class(recipe.data.dataset_class, recipe.train.objective)
    if task is None:
        return []
    return _key_lines("task", task, word) if word else section_lines("task", task, f"of {targets[0]}: ")


def _asked_lines(word: str, arch: str, targets: list[str]) -> list[str]:
    """The help of one section, or of one key wherever it is."""
    name = plain(word)
    section, _, leaf = SECTION_ALIASES.get(name, name).partition(".")
    if section == "model" and not leaf:
        return [*_model_lines(arch), "", *usual_lines(list(CHOICES))]
    if section == "task" and not leaf and (lines := _task_lines(targets)):
        return lines
    if section in SECTIONS and not leaf:
        return section_lines(section, SECTIONS[section])
    homes = [section] if leaf else list(SECTIONS)
    found = [line for home in homes for line in _key_lines(home, SECTIONS.get(home), leaf or name)]
    if not found and (not leaf or section == "model"):
        found = _key_lines("model", MODELS.get(arch).Config, leaf or name)
    found = found or _task_lines(targets, leaf or name)
    if found:
        return found
    if section == "task":
        raise ConfigError(f"--help {word}: the keys of a task follow from a recipe or file: treadle train collatz --help task")
    near = nearest(name, [*SECTIONS, "model", "all", *vocabulary().all_names()], otherwise="none is like it")
    raise ConfigError(f"--help {word}: no section or key is called so: {near} (sections: model, {', '.join(SECTIONS)}; all)")


def _key_lines(section: str, cls: type[Settings] | None, word: str) -> list[str]:
    for key in cls.model_fields if cls is not None else ():
        if cls is not None and word in (key, *cls.key_info(key)["aliases"]):
            return key_lines(section, cls, key)
    return _word_lines(cls, word) if cls is not None and word in cls.translations else []


def _word_lines(cls: type[Settings], word: str) -> list[str]:
    """Of a word that sets other keys (bf16): which, with their help where they are of a section that is known."""
    keys: list[str] = []
    for value in (True, False):  # what it sets may depend on its value; some take no boolean
        with contextlib.suppress(TypeError, ValueError, KeyError, AttributeError, IndexError, ConfigError):
            keys += [key for key in cls.translations[word](value) if key not in keys]
    said = [f"{word} is read as {' and '.join(keys)}" if keys else f"{word} is a word of [{cls.section_name()}]"]
    for section, _, key in (dotted.partition(".") for dotted in keys):
        said += key_lines(section, SECTIONS[section], key) if section in SECTIONS else []
    return said


def preset_lines(preset: str) -> list[str]:
    """Shape, size and recommended training values of a preset, in every architecture that has one of this name."""
    from treadle.models.base import count_label, parameter_count

    lines, known = [], []
    for arch in MODELS.names():
        cls = MODELS.get(arch)
        known += list(cls.Config.presets())
        keys = {plain(name): values for name, values in cls.Config.presets().items()}.get(plain(preset))
        if keys is None:
            continue
        count = parameter_count(cls, cls.Config.with_preset(preset))
        lines.append(f"{arch} {plain(preset)}: {count_label(count)} parameters (random until trained)")
        lines += [f"    model.{key} = {value}" for key, value in keys.items()]
        recommended = cls.Config.recommended(preset)
        lines += ["  recommended training values, used where nothing else is said (those of an optimiser with it alone):"] if recommended else []
        lines += [f"    {key} = {value}" for key, value in recommended.items()]
        lines.append(f"  train it: treadle train FILE --model.arch {arch} --model.preset {plain(preset)}")
    if not lines:
        raise ConfigError(f"--preset {preset}: {nearest(plain(preset), known)} (treadle models lists them)")
    return lines


def said_of_usage(problem: Any) -> str:
    """One line for a command line that no verb understands: the nearest verb or option, and where all of them stand."""
    said: str = problem.format_message()
    context = getattr(problem, "ctx", None)
    if context is None or said.startswith("Usage:"):  # a group without a verb shows its help
        return said
    place, verbs = context.command_path, getattr(context.command, "commands", {})
    option = getattr(problem, "option_name", None)
    unknown = re.match(r"No such command ['\"](.*?)['\"]", said)
    if unknown:
        word, names = unknown[1], {name: f"{place} {name}" for name in verbs}
        for group, command in verbs.items():  # `treadle prepare` is `treadle data prepare`
            names = {**{name: f"{place} {group} {name}" for name in getattr(command, "commands", {})}, **names}
        if Path(word).exists() or Path(word).suffix:
            return f"{word!r} is no verb; to train on it: treadle train {word}"
        near = nearest(word, list(names), meant=names, otherwise=f"{place} --help lists them")
        return f"unknown verb {word!r}: {near}"
    if option is not None and verbs:
        return f"{option}: a verb comes first, as in treadle train {option}; {place} --help lists them"
    if option is not None and said.startswith("No such option"):
        flags = [flag for p in context.command.params for flag in (*p.opts, *p.secondary_opts) if flag.startswith("--")]
        names = {flag.lstrip("-"): flag for flag in [*flags, "--help"]}
        word = option.lstrip("-").replace("_", "-")
        near = nearest(word, list(names), meant=names, otherwise="none is like it;")
        return f"{place}: unknown option {option}: {near} ({place} --help lists them all)"
    return f"{place}: {said.rstrip('.')}; see {place} --help"


def write_options() -> None:
    """Prints docs/options.md: every key of every section and every architecture."""
    from treadle.data.base import DATASETS

    sections = {**SECTIONS, **{f"model ({name})": MODELS.get(name).Config for name in MODELS.names()}}
    sections |= {f"task ({name})": own for name in DATASETS.names() if (own := DATASETS.get(name).Config) is not None}
    print(
        "# Every option\n\nWritten by `python -m treadle.help`. A key works as a flag, with or without its section.\n"
    )
    for name, cls in sections.items():
        print("```text\n" + "\n".join(section_lines(name, cls)) + "\n```\n")


if __name__ == "__main__":
    write_options()
