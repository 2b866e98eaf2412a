"""README.md of an export: Hugging Face's model card, from what the run's own files say.

Nothing is claimed that no file says: a licence that nobody stated is "unknown", a run that was not evaluated has no metrics.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from treadle.checkpoint.reader import Checkpoint
from treadle.models.huggingface import hub
from treadle.models.huggingface.peft import PeftFolder
from treadle.models.huggingface.reading import ForeignModel
from treadle.models.pretrained import home_of, read_config

FILE = "README.md"
LIBRARY = {"treadle": "treadle", "huggingface": "transformers", "gguf": "gguf", "peft": "peft"}
# Its digest tells a card that is as it was written from one that somebody edited, which is then kept.
MARK = "<!-- Written by treadle export ({}). A changed card is kept by the next export. -->\n"
MARKED = re.compile(r"<!-- Written by treadle export \(([0-9a-f]{16})\)\. A changed card is kept by the next export\. -->\n\Z")
EVALUATION, HARNESS = "results/evaluation_results.json", "results/harness_results.json"
FOLDERS = re.compile(r"""(?<![\w.:/~])(?:file://)?[~/](?:[^/\s"',\[\]]*/)*(?=[^/\s"',\[\]])""")  # of absolute paths; names of hosts and buckets stay
METRICS = ("loss", "bpb", "perplexity", "accuracy")  # of the run's own evaluation
TERMS = {"austen": "Jane Austen's six novels, in the public domain (the corpus that ships with treadle)"}


def run_name(checkpoint: Checkpoint) -> str:
    """What the model is called: the run's folder, or the folder or file of a model of somebody else's."""
    path = checkpoint.folder if isinstance(checkpoint, (ForeignModel, PeftFolder)) else home_of(checkpoint.folder)
    return re.sub(r"[^\w.-]+", "-", path.resolve().name.removesuffix(".gguf")).strip("-") or "model"


def card_of(
    checkpoint: Checkpoint, layout: str, precision: str, license: str | None, folder: Path, code: bool = False, tokenizer: bool = False
) -> bytes:
    """The card for an export into `folder`: the one that is there where it is somebody's own, else a new one. code: the export has a
    modeling file; tokenizer: a tokenizer.json."""
    try:
        there = (folder / FILE).read_bytes()
    except OSError:
        there = None
    if there is not None and not is_ours(there.decode("utf-8", "replace")):
        return there
    text = written(checkpoint, layout, precision, license, code, tokenizer)
    return (text + MARK.format(_digest(text))).encode()


def is_ours(text: str) -> bool:
    """Whether a card is one that was written here and not changed since."""
    found = MARKED.search(text)
    return found is not None and _digest(text[: found.start()]) == found[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def written(
    checkpoint: Checkpoint, layout: str, precision: str, license: str | None, code: bool = False, tokenizer: bool = False
) -> str:
    """The card without its last line."""
    config, home = read_config(checkpoint), home_of(checkpoint.folder)
    own = not isinstance(checkpoint, (ForeignModel, PeftFolder))
    summary = _table(home / "summary.json") if own else {}
    command = _table(home / "environment.json").get("command") if own else None
    command = [str(word) for word in command] if isinstance(command, list) else []
    base = _base(command) if own else str(checkpoint.folder)
    stated = license or stated_licence(checkpoint.folder if not own else Path(base or ""))
    data = _data(config)
    found = _results(home) if own else []
    arch = str(config.get("model", {}).get("arch", "model"))
    front: dict[str, Any] = {"license": stated or "unknown", "library_name": LIBRARY[layout], "tags": ["treadle", arch, *(["custom_code"] if code else [])]}
    if "tokenizer" in config or not own:
        front["pipeline_tag"] = "text-generation"
    if base and hub.is_hub_name(named := base.partition("@")[0]):
        front["base_model"] = named.removeprefix(hub.PREFIX)
    if data:
        front["datasets"] = data
    if found:
        front["metrics"] = list(dict.fromkeys(one["type"] for _, metrics in found for one in metrics))
        front["model-index"] = [{"name": run_name(checkpoint), "results": [
            {"task": {"type": "text-generation"}, "dataset": {"name": over, "type": over}, "metrics": metrics} for over, metrics in found]}]  # fmt: skip
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(), "---", "", f"# {run_name(checkpoint)}", ""]
    count = f" of {summary['parameters']:,} parameters" if isinstance(summary.get("parameters"), int) else ""
    lines += [f"A {arch} model{count}, written by treadle in {precision}, step {checkpoint.step}." if own else
              f"A {arch} model, converted by treadle from {Path(str(base)).name} in {precision}.", ""]  # fmt: skip
    lines += ["## Use", "", *_use(layout, code, tokenizer), ""]
    if data or base:
        lines += ["## Data", ""]
        lines += [f"- {name}" + (f": {TERMS[name]}" if name in TERMS else "") for name in data]
        lines += [f"- starts from the weights of {_short(base)}"] if base and own else []
        lines += [f"- {summary['tokens']:,} tokens were trained on"] if isinstance(summary.get("tokens"), int) else []
        lines += [""]
    if found:
        lines += ["## Metrics", "", "| on | metric | value |", "|---|---|---|"]
        lines += [f"| {over} | {one['name']} | {one['value']:.4f} |" for over, metrics in found for one in metrics] + [""]
    if command:
        lines += ["## Command", "", "```", shlex.join(_short(word) for word in command), "```", ""]
        if any(_short(word) != word for word in command):
            lines += ["Folders of absolute paths are left out.", ""]
    lines += ["## Licence", "", *_licence(stated, license is not None, base if own else None, data), ""]
    return "\n".join(lines)


def _use(layout: str, code: bool, tokenizer: bool) -> list[str]:
    if layout == "huggingface":
        more = ", trust_remote_code=True" if code else ""  # for the tokenizer too, which looks into config.json
        lines = ["```python", "from transformers import AutoModelForCausalLM" + (", AutoTokenizer" if tokenizer else ""), "",
                 f'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER"{more})',
                 *([f'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER"{more})'] if tokenizer else []), "```"]  # fmt: skip
        return [*lines, "", "The modeling file beside the weights needs torch and transformers alone."] if code else lines
    if layout == "peft":
        return ["```python", "from peft import AutoPeftModelForCausalLM", "", 'model = AutoPeftModelForCausalLM.from_pretrained("THIS_FOLDER")', "```"]
    if layout == "gguf":
        return ["```", "llama-cli -m FILE.gguf -p \"Once upon a time\"", "```"]  # fmt: skip
    return ["```", 'treadle generate THIS_FOLDER --prompt "Once upon a time"', "```"]


def _licence(stated: str | None, said: bool, base: str | None, data: list[str]) -> list[str]:
    if said:
        return [f"The weights: {stated}, as whoever exported them states."]
    if stated is not None:
        return [f"The weights they come from state {stated}; this model keeps that."]
    lines = ["Nobody stated one for these weights (treadle export --license NAME does)."]
    if base:
        lines.append(f"They come from {_short(base)}, whose terms go on.")
    lines += [f"Data: {TERMS[name]}." for name in data if name in TERMS]
    return lines


def _short(word: str) -> str:
    """A word of a command without the folders of absolute paths in it, which may name people."""
    return FOLDERS.sub("", word)


def _base(command: list[str]) -> str | None:
    """What --from names in a command."""
    for place, word in enumerate(command):
        if word.startswith("--from="):
            return word.removeprefix("--from=")
        if word == "--from" and place + 1 < len(command):
            return command[place + 1]
    return None


def _data(config: dict[str, Any]) -> list[str]:
    """The names of what the run was trained on; of files without their folders."""
    section = config.get("data", {})
    paths = section.get("path")
    names = [paths] if isinstance(paths, str) else list(paths or [])
    if not names and section.get("dataset_class") and section["dataset_class"] != "text":
        names = [section["dataset_class"]]
    return [_short(str(name)) for name in names]


def _results(home: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """(what was measured on, its numbers) of each evaluation that lies with the run."""
    found: list[tuple[str, list[dict[str, Any]]]] = []
    own = _table(home / EVALUATION)
    metrics = own.get("metrics")
    if isinstance(metrics, dict):
        numbers = [_metric(name, metrics[name]) for name in METRICS if isinstance(metrics.get(name), (int, float))]
        found += [(_short(str(own.get("data"))), numbers)] if numbers else []
    tasks = _table(home / HARNESS).get("tasks")
    for task, values in tasks.items() if isinstance(tasks, dict) else ():
        numbers = [_metric(name, value) for name, value in values.items() if isinstance(value, (int, float)) and "stderr" not in name]
        found += [(task, numbers)] if numbers else []
    return found


def _metric(name: str, value: float) -> dict[str, Any]:
    return {"type": {"bpb": "bits_per_byte"}.get(name, name), "name": name, "value": float(value)}


def stated_licence(place: Path) -> str | None:
    """What a model of somebody else's says its licence is: the card's own line, or general.license of a .gguf file."""
    if place.suffix.lower() == ".gguf" and place.is_file():
        from treadle.models.huggingface.gguf_file import GGUFFile

        said = GGUFFile(place).metadata.get("general.license")
        return said if isinstance(said, str) else None
    try:
        text = (place / FILE).read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError, RecursionError):
        return None
    said = front.get("license") if isinstance(front, dict) else None
    return said if isinstance(said, str) and said not in ("unknown", "other") else None


def _table(path: Path) -> dict[str, Any]:
    """A JSON file of the run's; {} where it is missing or no table."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
