"""Metrics against hand computation, baselines against known entropies."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import TINY
from treadle.data.base import Dataset
from treadle.data.batch import IGNORE
from treadle.evaluation.evaluator import Evaluator
from treadle.evaluation.report import evaluate_run, table_of, usual, write_results
from treadle.generation.text_checks import distinct, raw_bytes, utf8_validity
from treadle.models.base import build
from treadle.monitor.console import Console
from treadle.objectives.next_token import NextToken
from treadle.start import Request, train
from treadle.text.base import Tokenizer


@pytest.fixture(scope="module")
def data(text_file: Path) -> dict[str, Dataset]:
    return {s: Dataset.load(str(text_file), "byte", 32, split=s) for s in ("train", "validation")}


def test_metrics_by_hand(data: dict) -> None:
    model = build("transformer", vocab_size=256, hidden_size=16, num_layers=1, num_heads=2).eval()
    got = Evaluator(model, Tokenizer.load("byte")).evaluate(data["validation"], 3)
    nats, right, top5, count = 0.0, 0, 0, 0
    with torch.no_grad():
        for batch in data["validation"].in_sequence(1):
            logp = model(batch).logits.double().log_softmax(-1)[batch.labels != IGNORE]
            labels = batch.labels[batch.labels != IGNORE]
            nats -= float(logp[torch.arange(len(labels)), labels].sum())
            ranked = logp.argsort(-1, descending=True)[:, :5]
            right += int((ranked[:, 0] == labels).sum())
            top5 += int((ranked == labels[:, None]).any(-1).sum())
            count += len(labels)
    assert got is not None and got["labels"] == count == got["bytes"]
    assert got["loss"] == pytest.approx(nats / count, rel=1e-5) and got["bpb"] == pytest.approx(
        nats / count / math.log(2), rel=1e-5
    )
    assert got["accuracy"] == pytest.approx(right / count) and got["top5_accuracy"] == pytest.approx(top5 / count)
    assert got["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)


def test_a_uniform_model_has_exactly_eight_bits(data: dict) -> None:
    model = build("transformer", vocab_size=256, hidden_size=16, num_layers=1, num_heads=2)
    torch.nn.init.zeros_(model.embedding.weight)
    got = Evaluator(model, Tokenizer.load("byte")).evaluate(data["validation"])
    assert got is not None and got["bpb"] == pytest.approx(8.0, abs=1e-6)


def test_bits_per_byte_do_not_depend_on_the_tokenizer() -> None:
    """100 bytes at 1 nat each in all, whether as 100 tokens or 25: the same bits per byte."""
    a = NextToken().compute_metrics({"nats": 100.0, "correct": 0, "top5": 0, "labels": 100, "bytes": 100})
    b = NextToken().compute_metrics({"nats": 100.0, "correct": 0, "top5": 0, "labels": 25, "bytes": 100})
    assert a["bpb"] == b["bpb"] == pytest.approx(1 / math.log(2)) and a["loss"] != b["loss"]


def test_stopping_gives_none_and_fewer_rows_are_spread(data: dict) -> None:
    model = build("transformer", vocab_size=256, hidden_size=16, num_layers=1, num_heads=2)
    evaluator = Evaluator(model, Tokenizer.load("byte"))
    assert evaluator.evaluate(data["validation"], should_stop=lambda: True) is None and model.training
    part = next(iter(model.children())).eval()  # held so by whoever trains
    evaluator.evaluate(data["validation"], should_stop=lambda: True)
    assert model.training and not part.training
    train = data["train"]
    some = torch.cat([batch.input_ids for batch in train.in_sequence(4, 10)])
    every = torch.cat([batch.input_ids for batch in train.in_sequence(64)])
    assert len(some) == 10 and torch.equal(some[0], every[0]) and torch.equal(some[-1], every[-1])
    assert len(every) == len(train)


def test_baselines(data: dict) -> None:
    got = NextToken().baselines(data["train"], data["validation"])
    ids = np.asarray(data["train"].sets[0].document(0), dtype=np.int64)
    share = np.bincount(ids, minlength=256) / len(ids)
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    assert got["uniform"]["bpb"] == pytest.approx(8.0)
    assert got["unigram"]["bpb"] == pytest.approx(entropy, rel=0.03)
    assert got["bigram"]["bpb"] < 0.8 * got["unigram"]["bpb"]


def test_text_checks() -> None:
    assert utf8_validity("né".encode()) == 1 and utf8_validity("né".encode()[:-1]) == 1  # cut at the end
    assert (
        utf8_validity(b"") == 1
        and utf8_validity(b"ab\xff\xfe") == 0.5
        and utf8_validity(b"\xe9ab") == pytest.approx(2 / 3)
    )
    tokenizer = Tokenizer.load("byte")
    assert raw_bytes(tokenizer, [0x61, 0xE9, 0x62]) == b"a\xe9b"
    assert distinct("a b a b", 1) == 0.5 and distinct("a b c", 2) == 1.0 and distinct("", 1) == 1.0
    assert (
        usual(NextToken.metrics["bpb"], 1.0)
        and not usual(NextToken.metrics["bpb"], 2.0)
        and not usual(NextToken.metrics["accuracy"], 0.1)
        and usual(NextToken.metrics["labels"], 1)
    )


def test_the_report_of_a_run(text_file: Path, in_folder: Path) -> None:
    flags = {**TINY, "max_steps": "4", "run_name": "r", "eval_steps": "2", "at_end": "true"}
    train(Request(str(text_file), flags), Console(quiet=True))
    results = json.loads((in_folder / "runs" / "r" / "results" / "evaluation_results.json").read_text())
    assert results["metrics"]["bpb"] > 0 and len(results["samples"]) == 3
    assert (in_folder / "runs" / "r" / "results" / "generations.txt").read_text().count("===") == 3
    whole = evaluate_run("runs/r", samples=1)
    logged = [json.loads(line) for line in (in_folder / "runs" / "r" / "metrics.jsonl").read_text().splitlines()]
    assert whole["baselines"]["uniform"]["bpb"] == pytest.approx(8.0) and whole["step"] == 4
    assert logged[-1]["split"] == "validation"
    for choice in ("runs/r@best", "runs/r@2", "last", "runs/r/checkpoints/step-00000004"):
        assert evaluate_run(choice, rows=2, with_baselines=False)["metrics"]["labels"] > 0
    other = in_folder / "other.txt"
    other.write_text("The wheel turned and the thread ran on.\n" * 50)
    assert evaluate_run("last", data=str(other), samples=0)["metrics"]["bytes"] == 50 * 40
    lines = "\n".join(table_of([whole, whole]))
    assert "bpb" in lines and "uniform: bpb 8.0000" in lines and "customary" in lines
    write_results(in_folder / "x", whole)
    model, tokenizer = __import__("treadle").load("runs/r")
    rows = Evaluator(model, tokenizer).compare_checkpoints(
        ["runs/r/checkpoints/step-00000002", "runs/r/checkpoints/step-00000004"],
        Dataset.load(str(text_file), "byte", 32),
    )
    assert [r["step"] for r in rows] == [2, 4] and rows[0]["loss"] != rows[1]["loss"]
