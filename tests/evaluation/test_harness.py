"""`eval --tasks`: every answer equals the harness's own `hf` model on the exported folder, and is kept; wrong tasks are refused."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.harness_runs import TASKS, TEXTS, a_run, write_tasks
from treadle import cli
from treadle.errors import ConfigError, InputError, MissingExtra
from treadle.models.export import export
from treadle.models.pretrained import load_run, tokenizer_of

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not here: pip install 'treadle[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from treadle.evaluation.answers import Answers
from treadle.evaluation.harness import _load, _quiet, _sandboxed, _spec, evaluate_tasks, lines_of
from treadle.evaluation.harness_model import HarnessModel


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_run(tmp_path_factory.mktemp("harness") / "run")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def theirs(run: Path) -> HFLM:
    folder = export(str(run), layout="huggingface")
    return HFLM(pretrained=str(folder), tokenizer=str(folder), device="cpu", dtype="float32", batch_size=3)


@pytest.fixture(scope="module")
def ours(run: Path) -> HarnessModel:
    loaded = load_run(str(run), "cpu")
    return HarnessModel(loaded.model, tokenizer_of(loaded), batch_size=3)


def asked(kind: str, *questions: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=question, idx=number) for number, question in enumerate(questions)]


LONG = " ".join(TEXTS[:8])  # beyond a row of 48 tokens
PAIRS = [
    ("The wheel turned", " and"), ("The wheel turned ", "and the thread"), ("", "The wheel"), ("", " x"), ("The wheel turned", " and"),
    ("She had been told", " that the house was empty."), ("She had been told", " that"), (LONG, " nothing"), (LONG, " said nothing, and looked"),
    ("naïve — ", "日本"), ("He said", "\n\n"), ("a<|endoftext|>b", " c"), ("The wheel turned", " an"), ("x", " " + " ".join(LONG.split()[:18])),
]  # fmt: skip


def test_loglikelihoods_of_continuations(ours: HarnessModel, theirs: HFLM) -> None:
    found, wanted = ours.loglikelihood(asked("loglikelihood", *PAIRS)), theirs.loglikelihood(asked("loglikelihood", *PAIRS))
    assert (ours.max_length, ours.prefix_token_id, ours.eot_token_id) == (48, theirs.prefix_token_id, theirs.eot_token_id)
    for pair, (log, likeliest), (their_log, their_likeliest) in zip(PAIRS, found, wanted):
        assert math.isclose(log, their_log, rel_tol=1e-5, abs_tol=1e-5), pair
        assert likeliest == their_likeliest, pair
    (blank,) = ours.loglikelihood(asked("loglikelihood", ("  ", "He")))  # of which theirs stops with an assertion
    assert blank == ours.loglikelihood(asked("loglikelihood", ("", "  He")))[0]
    assert all(len(theirs.tok_encode(a + b)) == len(ours.tok_encode(a + b)) for a, b in PAIRS)


def test_the_likeliest_continuation_is_known_as_such(ours: HarnessModel, theirs: HFLM) -> None:
    """What the model itself would write, of one and of several tokens, beside one that differs in the last token alone."""
    contexts = [" ".join(LONG.split()[:count]) for count in range(1, 28)]
    texts = ours.generate_until(asked("generate_until", *((context, {"until": [], "max_gen_toks": 2}) for context in contexts)))
    pairs = [(context, text) for context, text in zip(contexts, texts) if text and "\ufffd" not in text]
    pairs += [(context, text[:-1] + "q") for context, text in pairs]
    found, wanted = ours.loglikelihood(asked("loglikelihood", *pairs)), theirs.loglikelihood(asked("loglikelihood", *pairs))
    assert [one[1] for one in found] == [one[1] for one in wanted]
    assert 2 <= sum(one[1] for one in found) < len(found)
    for (log, _), (their_log, _) in zip(found, wanted):
        assert math.isclose(log, their_log, rel_tol=1e-5, abs_tol=1e-5)


def test_loglikelihoods_of_whole_texts(ours: HarnessModel, theirs: HFLM) -> None:
    texts = [(LONG,), ("The wheel",), ("x",), (" ".join(TEXTS[:3]),), ("",)]
    found = ours.loglikelihood_rolling(asked("loglikelihood_rolling", *texts))
    wanted = theirs.loglikelihood_rolling(asked("loglikelihood_rolling", *texts[:-1]), disable_tqdm=True)
    assert found[-1] == 0.0
    for one, their in zip(found, wanted):
        assert math.isclose(one, their, rel_tol=1e-5)
    assert len(ours.tok_encode(LONG)) > 2 * ours.max_length  # several windows


def test_generation(ours: HarnessModel, theirs: HFLM) -> None:
    questions = [
        *((text, {"until": ["e"], "max_gen_toks": 12}) for text in TEXTS[:5]), (LONG, {"until": ["."], "max_gen_toks": 9, "do_sample": False}),
        (LONG, {"until": [], "max_new_tokens": 40}), ("The", {"until": ["th", "a"], "max_gen_toks": 20, "temperature": 0.0}),
        ("She", {"until": "w", "max_gen_toks": 6}),
    ]  # fmt: skip
    found = ours.generate_until(asked("generate_until", *questions))
    assert found == theirs.generate_until(asked("generate_until", *questions), disable_tqdm=True)
    assert len(set(found)) > 3 and any(len(text) > 8 for text in found)
    with pytest.raises(ConfigError, match="--max_length"):
        ours.generate_until(asked("generate_until", ("The", {"max_gen_toks": 48})))
    with pytest.raises(ConfigError, match="penalty_alpha"):
        ours.generate_until(asked("generate_until", ("The", {"max_gen_toks": 4, "penalty_alpha": 0.5})))
    drawn = [ours.generate_until(asked("generate_until", ("The", {"max_gen_toks": 8, "do_sample": True, "temperature": 1.5}))) for _ in range(2)]
    assert drawn[0] == drawn[1]  # by the place of the question


@pytest.mark.parametrize("shots", [0, 2])
def test_tasks_give_the_numbers_of_the_hf_model(shots: int, run: Path, tasks: str, theirs: HFLM, tmp_path: Path) -> None:
    report = evaluate_tasks(str(run), tasks, num_fewshot=shots, batch_size=4, device="cpu", output=str(tmp_path))
    with _quiet(), _sandboxed():
        manager, specs = _load([_spec(name) for name in tasks.split(",")])
        wanted = simple_evaluate(theirs, tasks=specs, task_manager=manager, num_fewshot=shots, bootstrap_iters=1000, log_samples=False)
    assert wanted is not None and report["tasks"].keys() == TASKS.keys()
    for task, values in report["tasks"].items():
        their = wanted["results"][task]
        for name, value in values.items():
            assert math.isclose(value, their[f"{name},none"], rel_tol=1e-4, abs_tol=1e-6), (task, name)
    assert report["documents"] == dict.fromkeys(TASKS, 14) and report["shots"]["rhymes"] == shots


def test_answers_are_kept(run: Path, tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = run / "results" / "harness_results.json"
    first = evaluate_tasks(str(run), tasks, device="cpu", batch_size=5)
    assert json.loads(results.read_text())["tasks"] == first["tasks"]
    (kept,) = (run / "results" / "harness_answers").iterdir()
    whole = kept.read_text()
    kept.write_text(whole[: len(whole) // 2])  # as if it had been killed
    assert evaluate_tasks(str(run), tasks, device="cpu", batch_size=5)["tasks"] == first["tasks"]
    lines = [json.loads(line) for line in kept.read_text().splitlines() if line.startswith('{"asked"') and line.endswith("}")]
    assert {line["asked"] for line in lines} >= {json.loads(line)["asked"] for line in whole.splitlines()}

    def never(*_: Any) -> None:
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(HarnessModel, "_logits", never)
    monkeypatch.setattr(HarnessModel, "_asked", never)
    assert evaluate_tasks(str(run), tasks, device="cpu", batch_size=2)["tasks"] == first["tasks"]
    with pytest.raises(AssertionError, match="again"):
        evaluate_tasks(str(run), tasks, device="cpu", max_length=24)  # another model, as far as answers go
    with pytest.raises(AssertionError, match="again"):
        evaluate_tasks(str(a_run(tmp_path / "run", seed=1)), tasks, device="cpu")


def test_a_row_that_several_ask_for_is_read_once(ours: HarnessModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    whole = ours._logits
    monkeypatch.setattr(ours, "_logits", lambda batch: rows.append(len(batch)) or whole(batch))
    pairs = [("The wheel", f" {letter}") for letter in "abcdefgh"]
    split = [ours._encode_pair(*pair) for pair in pairs]
    different = {tuple(context + continuation[:-1]) for context, continuation in split}
    assert len(ours.loglikelihood(asked("loglikelihood", *pairs))) == 8
    assert sum(rows) == len(different) <= 2 and max(rows) <= ours.batch_size


def test_the_command_line(
    run: Path, tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def ended(*line: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["treadle", *map(str, line)])
        capfd.readouterr()
        return cli._run(), *capfd.readouterr()

    code, out, err = ended("eval", run, "--tasks", tasks, "--limit", 3, "--num_fewshot", 1, "--output", "here")
    assert code == 0 and err == "" and "rhymes" in out and "acc_norm" in out and "±" in out and "at most 3 documents" in out
    table = json.loads((tmp_path / "here" / "harness_results.json").read_text())
    assert table["documents"] == dict.fromkeys(TASKS, 3) and lines_of(table)[0].startswith("task")
    # The harness's own index of 14,683 names takes 11 s of CPU time to read; an empty one answers the same question.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_defaults: TaskManager(include_defaults=False))
    code, out, err = ended("eval", run, "--tasks", "no_such_task")
    assert code == 2 and "no task 'no_such_task'" in err
    code, out, err = ended("eval", run, "--tasks", tasks.split(",")[0], "--apply_chat_template")
    assert code == 2 and "no chat template" in err


def test_files_that_are_no_tasks(tmp_path: Path) -> None:
    def written(text: str, name: str = "task.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    with pytest.raises(ConfigError, match="!function"):
        _spec(written("task: a\nprocess_docs: !function utils.run\n"))
    written("doc_to_text: !function utils.run\n", "base.yaml")
    with pytest.raises(ConfigError, match="!function"):
        _spec(written("include: base.yaml\ntask: a\n"))
    written("doc_to_text: theirs\ndoc_to_target: kept\n", "base.yaml")
    assert _spec(written("include: base.yaml\ntask: a\ndoc_to_text: own\n")) == {"task": "a", "doc_to_text": "own", "doc_to_target": "kept"}
    for text, said in (("include: task.yaml\ntask: a\n", "includes itself"), ("[1, 2]", "no table"), ("a: [", "not YAML"), ("a: 1", "key task")):
        with pytest.raises(InputError, match=said):
            _spec(written(text))
    with pytest.raises(InputError, match="cannot be read"):
        _spec("nowhere.yaml")
    with pytest.raises(InputError, match="cannot be prepared"), _quiet():
        _load([_spec(written("task: a\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.json}}\ntest_split: test\n"))])


def test_templates_of_a_file_run_no_code(run: Path, tasks: str, tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    text = Path(tasks.split(",")[0]).read_text().replace("data.json", str(Path(tasks.split(",")[0]).parent / "data.json"))
    path.write_text(text.replace("'{{question}}'", "\"{{ question.__class__.__mro__[1].__subclasses__() }}\""))
    assert "__mro__" in path.read_text()
    with pytest.raises(Exception, match="unsafe"):
        evaluate_tasks(str(run), str(path), device="cpu", output=str(tmp_path))
    from lm_eval import utils

    assert "Sandboxed" not in type(utils.env).__name__  # outside it is the harness's own again


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match="eval"):
        evaluate_tasks("nowhere", "a")


def test_answers_alone(tmp_path: Path) -> None:
    answers = Answers.of(tmp_path / "folder", {"a": 1}, None)
    answers.add("kind", ("question", {"b": [1]}), [0.5, True])
    assert answers.get("kind", ("question", {"b": [1]})) == [0.5, True] and answers.get("other", ("question", {"b": [1]})) is None
    assert Answers.of(tmp_path / "folder", {"a": 1}, None).get("kind", ("question", {"b": [1]})) == [0.5, True]
    assert Answers.of(tmp_path / "folder", {"a": 2}, None).get("kind", ("question", {"b": [1]})) is None
    nowhere = Answers(None)
    nowhere.add("kind", ("question",), 1)
    assert nowhere.get("kind", ("question",)) is None
