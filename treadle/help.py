"""`treadle train --help`: every key of the configuration, from the sections' own documentation."""

from __future__ import annotations

import re
import textwrap

from treadle.settings import Settings, describe_type, parse_flags
from treadle.training.config import SECTIONS

INTRODUCTION = {
    "train": """treadle train [RECIPE.toml | FILE.txt | DIR] [--key value ...]

Trains a model; the same command again continues it. Without an argument: the built-in recipe on the bundled text.
A key works without its section where it is unambiguous: --max_steps 100 is --train.max_steps 100.

  --fresh             start anew in a new folder
  --from RUN          start from the weights of another run
  --allow-change KEY  go on although KEY (or section) differs from what the run was started with
  --trust-code FILE   let a recipe or run that names FILE.py:CLASS execute FILE.py (a name typed here needs no flag)
""",
    "plan": """treadle plan [RECIPE.toml | FILE.txt | DIR] [--world N] [--parallel ddp | fsdp] [--key value ...]

Memory of one process by kind, bytes it sends in a step, and estimated scaling, before anything is started.

  --world N           processes (default parallel.world_size, run.devices, or 1)
  --memory SIZE       say whether it fits in this much for one process, as in 80GiB
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


def section_lines(name: str, cls: type[Settings]) -> list[str]:
    """Help lines of one section: key, type, default, meaning, other names."""
    lines = [f"[{name}] {(cls.__doc__ or '').strip().splitlines()[0]}"]
    for key, info in cls.model_fields.items():
        default = info.get_default(call_default_factory=True)
        shown = "" if default is None else f", default {default!r}"
        lines.append(f"  --{name}.{key}  ({describe_type(info.annotation)}{shown})")
        meaning = re.sub(r"\s+", " ", info.description or "")
        aliases = cls.key_info(key)["aliases"]
        if aliases:
            meaning += f" Also: {', '.join(aliases)}."
        lines += textwrap.wrap(meaning, 100, initial_indent="        ", subsequent_indent="        ")
    return lines


def print_options(verb: str, arguments: list[str]) -> None:
    """The verb's help; with --model.arch NAME also that architecture's keys (which imports torch)."""
    print(INTRODUCTION[verb])
    for name, cls in SECTIONS.items():
        print("\n".join(section_lines(name, cls)) + "\n")
    _, flags = parse_flags([a for a in arguments if a != "--help"])
    arch = flags.get("model.arch") or flags.get("arch")
    if arch is None:
        print(
            "[model] The architecture's own keys: treadle train --model.arch NAME --help (treadle models lists names)"
        )
        return
    from treadle import trusted_code
    from treadle.models.catalogue import MODELS

    trusted_code.allow_names(arch)  # typed
    print("\n".join(section_lines("model", MODELS.get(arch).Config)))


def write_options() -> None:
    """Prints docs/options.md: every key of every section and every architecture."""
    from treadle.models.catalogue import MODELS

    sections = {**SECTIONS, **{f"model ({name})": MODELS.get(name).Config for name in MODELS.names()}}
    print(
        "# Every option\n\nWritten by `python -m treadle.help`. A key works as a flag, with or without its section.\n"
    )
    for name, cls in sections.items():
        print("```text\n" + "\n".join(section_lines(name, cls)) + "\n```\n")


if __name__ == "__main__":
    write_options()
