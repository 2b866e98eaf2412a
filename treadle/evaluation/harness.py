"""`treadle eval RUN --tasks`: lm-evaluation-harness asks a run its tasks; the numbers are saved with the run.

A task is one of the harness's own, by name, or a YAML file in its form. A file brings no code: `!function` is refused, and its
templates are rendered in Jinja's sandbox, which the harness itself does not do.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from treadle.errors import ConfigError, InputError, MissingExtra
from treadle.evaluation.answers import Answers
from treadle.generation.reading import in_format
from treadle.models.huggingface.peft import is_peft
from treadle.models.huggingface.reading import is_foreign
from treadle.models.pretrained import Loaded, generation_file, home_of, load_run, tokenizer_of
from treadle.models.quantized import quantize_once
from treadle.monitor.records import write_json
from treadle.registry import nearest

FILE = "harness_results.json"
KEPT_IN = "harness_answers"  # a folder beside the results
RESAMPLES = 1000  # for the standard errors of metrics that have no formula (the harness's own default takes minutes)
SUFFIXES = (".yaml", ".yml")


def evaluate_tasks(
    run: str, tasks: str, *, num_fewshot: int | None = None, limit: int | None = None, batch_size: int = 16, device: str = "auto",
    weights: str | None = None, max_length: int | None = None, apply_chat_template: bool = False, output: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Asks a run the tasks (names and files, with commas between them) and returns the report that is saved in RUN/results, or in
    `output`. limit: the first so many documents of each task; max_length: tokens of a row. ConfigError and InputError say which
    task, file or setting is wrong."""
    _refuse_missing()
    specs = [_spec(name) for name in tasks.split(",") if name.strip()]
    if not specs:
        raise ConfigError("--tasks names no task; give names of lm-evaluation-harness or .yaml files, with commas between them")
    from treadle.evaluation.harness_model import HarnessModel

    loaded = load_run(run, device)
    tokenizer = tokenizer_of(loaded)
    folder = _folder(loaded, output)
    with _quiet(), _sandboxed():
        found = _load(specs)
        model = HarnessModel(
            in_format(loaded.model, quantize_once(loaded, weights)) if weights is not None else loaded.model, tokenizer,
            batch_size=batch_size, max_length=max_length, stop_ids=_stop_ids(loaded), answers=_answers(loaded, folder, weights, max_length),
        )  # fmt: skip
        results = _asked(model, found, num_fewshot, limit, apply_chat_template)
    report = {
        "run": run, "checkpoint": str(loaded.checkpoint.folder), "step": loaded.checkpoint.step,
        "harness": metadata.version("lm-eval"), "max_length": model.max_length, "chat_template": apply_chat_template,
        **({"weights": weights} if weights is not None else {}), **_numbers(results), "limit": limit,
    }  # fmt: skip
    if folder is not None:
        write_json(folder / FILE, _with_earlier(folder / FILE, report))
    return report


def lines_of(report: dict[str, Any]) -> list[str]:
    """A table for people: task, examples shown, documents, and each metric with its standard error."""
    lines = [f"{'task':<24}{'shots':>6}{'documents':>11}  metric"]
    for task, values in report["tasks"].items():
        shots, count = report["shots"].get(task, "-"), report["documents"].get(task, "-")
        for name, value in values.items():
            if "_stderr" in name:
                continue
            error = values.get(_error_of(name))
            told = f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, (int, float)) else "")
            lines.append(f"{task:<24}{shots!s:>6}{count!s:>11}  {name} {told}")
            task, shots, count = "", "", ""
    if report["limit"] is not None:
        lines.append(f"at most {report['limit']} documents of each task: no figures to compare with others'")
    return lines


def _error_of(name: str) -> str:
    """acc -> acc_stderr; exact_match,strict -> exact_match_stderr,strict."""
    metric, comma, chosen = name.partition(",")
    return f"{metric}_stderr{comma}{chosen}"


def _refuse_missing() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise MissingExtra("--tasks", "eval") from None


# ---- tasks ----


def _spec(name: str) -> str | dict[str, Any]:
    """A task's name, or what its file says."""
    name = name.strip()
    path = Path(name)
    if path.suffix.lower() not in SUFFIXES and not path.is_file():
        return name
    table = _read(path, ())
    if not ({"task", "group"} & table.keys()):
        raise InputError(f"--tasks: {name} holds no table with the key task")
    return _placed(table, path.parent)


def _read(path: Path, inside: tuple[Path, ...]) -> dict[str, Any]:
    """A task's file with what it includes, whose keys its own win over. inside: the files that include it."""
    if path.resolve() in inside:
        raise InputError(f"--tasks: {path} includes itself")
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise InputError(f"--tasks: {path} cannot be read ({problem.strerror or problem})") from None
    except (ValueError, yaml.YAMLError, RecursionError) as problem:
        if "!function" in str(problem):
            raise ConfigError(f"--tasks: {path} asks for Python code (!function), which a task's file may not bring; write it with "
                              "templates (doc_to_text), or ask a task of the harness's own by its name") from None  # fmt: skip
        raise InputError(f"--tasks: {path} is not YAML: {' '.join(str(problem).split())[:300]}") from None
    if not isinstance(table, dict):
        raise InputError(f"--tasks: {path} holds no table")
    included: dict[str, Any] = {}
    names = table.pop("include", [])
    for one in names if isinstance(names, list) else [names]:
        included.update(_read(path.parent / str(one), (*inside, path.resolve())))
    return {**included, **table}


def _placed(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Its data files as seen from here: a name that is no file here is one beside the task's file."""

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: placed(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [placed(inner) for inner in value]
        if isinstance(value, str) and "://" not in value and not Path(value).exists() and (folder / value).exists():
            return str((folder / value).resolve())
        return value

    kwargs = table.get("dataset_kwargs")
    if isinstance(kwargs, dict):
        table = {**table, "dataset_kwargs": {key: placed(value) if key in ("data_files", "data_dir") else value for key, value in kwargs.items()}}
    if isinstance(table.get("task"), list):
        table = {**table, "task": [_placed(one, folder) if isinstance(one, dict) else one for one in table["task"]]}
    return table


def _load(specs: list[str | dict[str, Any]]) -> tuple[Any, list[Any]]:
    """(the harness's manager, which has loaded the tasks, the tasks). InputError for an unknown name, or data that cannot be had."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=any(isinstance(spec, str) for spec in specs))
    for spec in specs:
        if isinstance(spec, str) and spec not in manager.task_index:
            raise InputError(f"--tasks: lm-evaluation-harness {metadata.version('lm-eval')} has no task {spec!r} "
                             f"({nearest(spec, list(manager.task_index), otherwise='lm-eval ls tasks lists them')}), and it is no file here")  # fmt: skip
    try:
        tasks = manager.load(specs)
    except Exception as problem:  # of the harness, of datasets and of the network
        said = " ".join(str(problem).split()) or type(problem).__name__
        raise InputError(f"--tasks: the tasks cannot be prepared: {said[:400]}") from None
    manager.load = lambda task_list: tasks  # once is enough
    return manager, specs


@contextlib.contextmanager
def _sandboxed() -> Iterator[None]:
    """Templates of tasks in Jinja's sandbox meanwhile."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    before = utils.env
    inside = ImmutableSandboxedEnvironment(loader=before.loader, undefined=before.undefined, keep_trailing_newline=True)
    inside.filters.update(before.filters)
    utils.env = inside
    try:
        yield
    finally:
        utils.env = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's talk and progress bars, which would stand between the lines of this program."""
    import datasets
    import tqdm
    from lm_eval import evaluator
    from lm_eval.api import task

    logger, level = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level

    def no_bar(items: Any = None, *_: Any, **__: Any) -> Any:
        return items

    silent = {(task, "tqdm"): no_bar, (tqdm, "tqdm"): no_bar,  # imported from there for each resampling
              (evaluator, "get_git_commit_hash"): lambda: None}  # git speaks where there is no repository
    before = {place: getattr(*place) for place in silent if hasattr(*place)}
    bars = not datasets.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    for place in before:
        setattr(*place, silent[place])
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
        for place, own in before.items():
            setattr(*place, own)


def _asked(model: Any, found: tuple[Any, list[Any]], num_fewshot: int | None, limit: int | None, conversations: bool) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    manager, specs = found
    results = simple_evaluate(
        model, tasks=specs, task_manager=manager, num_fewshot=num_fewshot, limit=limit, batch_size=model.batch_size, log_samples=False,
        bootstrap_iters=RESAMPLES, apply_chat_template=conversations,
    )  # fmt: skip
    assert results is not None  # there is one process
    return dict(results)


# ---- results ----


def _numbers(results: dict[str, Any]) -> dict[str, Any]:
    """tasks: {task: {metric: number}}, documents and shots by task; the filter "none" is not written."""
    tasks: dict[str, dict[str, float]] = {}
    for task, values in results["results"].items():
        kept = {name.removesuffix(",none"): value for name, value in values.items() if isinstance(value, (int, float)) and "," in name}
        if kept:
            tasks[task] = {name: float(value) for name, value in kept.items()}
    documents = {task: counts["effective"] for task, counts in results.get("n-samples", {}).items()}
    return {"tasks": tasks, "documents": documents, "shots": dict(results.get("n-shot", {})), "versions": dict(results.get("versions", {}))}


def _with_earlier(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The report with other tasks' numbers of the same checkpoint and settings, asked earlier."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        same = all(earlier.get(key) == report.get(key) for key in ("checkpoint", "step", "max_length", "chat_template", "weights", "limit", "harness"))
        merged = {key: {**earlier[key], **report[key]} for key in ("tasks", "documents", "shots", "versions")} if same else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        merged = {}
    return {**report, **merged}


def _folder(loaded: Loaded, output: str | None) -> Path | None:
    """Where results go; None beside a model of somebody else's, into whose folder nothing is written."""
    if output is not None:
        return Path(output)
    return None if is_foreign(loaded.checkpoint.folder) or is_peft(loaded.checkpoint.folder) else home_of(loaded.checkpoint.folder) / "results"


def _answers(loaded: Loaded, folder: Path | None, weights: str | None, max_length: int | None) -> Answers:
    """Kept by what decides them: the checkpoint's checksums, the number format and the device."""
    files = loaded.checkpoint.manifest.get("files") or {}
    if folder is None or not files:
        return Answers(None)
    sums = {name: entry["sha256"] for name, entry in files.items()}
    return Answers.of(folder / KEPT_IN, sums, weights, max_length, str(loaded.model.device.type))


def _stop_ids(loaded: Loaded) -> list[int]:
    """Tokens that end a generation by the model's generation_config.json, as transformers reads it."""
    said = generation_file(loaded.checkpoint.folder)[1].get("eos_token_id")
    return [one for one in (said if isinstance(said, list) else [said]) if isinstance(one, int)]
