"""Equal shapes, equal budgets and the same rows: what a suite works out before it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from treadle import trusted_code
from treadle.data.base import BatchPlan
from treadle.data.dataset import splits_of
from treadle.data.settings import DataSettings
from treadle.errors import ConfigError
from treadle.models.base import Model, ModelConfig, parameter_count
from treadle.models.catalogue import MODELS
from treadle.planning.equal_parameters import equal_parameters
from treadle.suite.design import variants
from treadle.suite.jobs import Job, Jobs
from treadle.suite.results import table
from treadle.suite.settings import Suite, builtin_suites, read_suite
from treadle.text.settings import TokenizerSettings

MIXERS = ["block_sparse_attention", "linear_attention", "ssd", "hgrn", "retnet", "rwkv", "gated_deltanet"]
KINDS: list[tuple[str, dict[str, Any]]] = [(name, {"num_heads": 1} if name in ("hgrn_bit", "hnet") else {}) for name in MODELS.names()]
KINDS += [("transformer", {"layer_types": [mixer]}) for mixer in MIXERS]


@pytest.mark.parametrize(("arch", "fixed"), KINDS, ids=lambda one: one if isinstance(one, str) else str(one.get("layer_types", "")))
@pytest.mark.parametrize("parameters", [100_000, 3_000_000, 100_000_000])
def test_every_architecture_has_a_shape_of_so_many_parameters(arch: str, fixed: dict[str, Any], parameters: int) -> None:
    found = equal_parameters(arch, parameters, fixed, {"num_layers": 4, "num_heads": 4, "vocab_size": 256})
    cls = MODELS.get(arch)
    assert parameter_count(cls, cls.Config.with_preset(None, **found.keys)) == found.parameters
    assert abs(found.parameters / parameters - 1) <= 0.02
    assert all(found.keys[key] == value for key, value in fixed.items())


def test_what_is_fixed_stays_and_what_cannot_be_names_the_nearest() -> None:
    found = equal_parameters("transformer", 500_000, {"hidden_size": 64, "num_layers": 6}, {"num_heads": 4})
    assert found.keys["hidden_size"] == 64 and found.keys["num_layers"] == 6 and abs(found.parameters / 500_000 - 1) <= 0.02
    with pytest.raises(ConfigError, match=r"the nearest .* Ask for [0-9]+ parameters"):
        equal_parameters("transformer", 500_000, {"hidden_size": 8, "num_layers": 1, "num_heads": 2})


def suite(text: Path, **changes: Any) -> Suite:
    entries = [{"label": "one", "architecture": "transformer"}, {"architecture": "hgrn_bit", "keys": {"num_heads": 1}}]
    table: dict[str, Any] = {"base": str(text), "parameters": 40_000, "budget": {"bytes": 8192}, "entries": entries,
                             "keys": {"seq_len": 32, "per_device_train_batch_size": 4, "tokenizer.name": "byte"},
                             "shape": {"num_layers": 2, "num_heads": 2}}  # fmt: skip
    return Suite({**table, **changes}, "some.toml")


def test_a_model_that_does_not_say_how_many_tokens_it_knows_is_refused_before_any_job(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Keys(ModelConfig):
        """None."""

    class Bare(Model):
        """A head, and no vocab_size."""

        Config = Keys

        def __init__(self, config: Keys) -> None:
            super().__init__()
            self.config, self.head = config, nn.Linear(4, 256)

    monkeypatch.setattr("treadle.suite.design.MODELS.get", lambda name: Bare)
    with pytest.raises(ConfigError, match=r"has no key vocab_size.*treadle\.LanguageModelConfig"):
        variants(suite(text_file, parameters=None, entries=[{"label": "bare"}]))


def test_a_budget_of_bytes_gives_each_the_same_bytes(text_file: Path) -> None:
    found = variants(suite(text_file))
    assert [v.steps for v in found] == [64, 64] and [v.bytes_per_step for v in found] == [128, 128]
    assert len({v.fingerprint for v in found}) == 1  # and the same rows


def test_an_entry_with_a_tokenizer_of_its_own_sees_as_many_bytes(text_file: Path) -> None:
    keys = {"tokenizer.name": "bpe", "tokenizer.vocab_size": 300}
    one, other = variants(suite(text_file, entries=[{"label": "bytes"}, {"label": "words", "keys": keys}]))
    assert other.bytes_per_step > 1.5 * one.bytes_per_step and other.steps < one.steps and other.fingerprint != one.fingerprint
    for variant in (one, other):  # to the rounding of steps to whole evaluations
        assert abs(variant.steps * variant.bytes_per_step - 8192) <= 2 * variant.bytes_per_step


def test_budgets_of_flops_and_seconds(text_file: Path) -> None:
    found = variants(suite(text_file, budget={"flops": 2e9}))
    assert all(abs(v.steps * v.flops_per_step / 2e9 - 1) < 2 / v.steps + 1e-9 for v in found)
    assert [v.steps for v in variants(suite(text_file, budget={"cpu_seconds": 5.0}))] == [0, 0]  # known once a step is timed


def test_rows_do_not_depend_on_the_architecture(text_file: Path) -> None:
    def rows(tables: dict[str, Any]) -> torch.Tensor:
        data = DataSettings(**tables["data"])
        train = splits_of(data, TokenizerSettings(**tables["tokenizer"]), None, 3)["train"]
        steps = train.batches(train.start, BatchPlan(seed=3, global_batch_size=4, steps=3))
        return torch.cat([batch.input_ids for batches, _ in steps for batch in batches])

    one, other = (rows(v.tables) for v in variants(suite(text_file)))
    assert torch.equal(one, other)


@pytest.mark.parametrize(("changes", "said"), [
    ({"budget": {}}, r"no \[budget\]"),
    ({"budget": {"bytes": 1.0, "flops": 1.0}}, "exactly one"),
    ({"budget": {"bites": 1.0}}, "bytes"),
    ({"entries": []}, "entries"),
    ({"entries": [{"architecture": "transfomer"}]}, "transformer"),
    ({"entries": [{}, {}]}, "two entries"),
    ({"entries": [{"keys": {"lr": 1e-3}}]}, "sets lr itself"),
    ({"keys": {"run.seed": 3}}, "sets run.seed itself"),
    ({"learning_rates": [1e-3, 1e-3]}, "different numbers"),
    ({"sizes": [1000, 2000]}, "parameters or sizes"),
    ({"probes": {"names": ["copi"]}}, "copy"),
    ({"seedz": 3}, "seeds"),
])  # fmt: skip
def test_what_cannot_be_is_said(text_file: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        suite(text_file, **changes)


def test_an_entry_that_cannot_be_is_named(text_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"entry 'one': .*hidden_siz"):
        variants(suite(text_file, entries=[{"label": "one", "keys": {"hidden_siz": 3}}]))


def test_which_way_a_metric_is_better_is_the_objectives_to_say(text_file: Path, tmp_path: Path) -> None:
    """Not that of the metric it ranks by: rates are chosen by it."""
    asked = suite(text_file, metric="accuracy", learning_rates=[1e-3, 1e-2])
    jobs = Jobs(asked, variants(asked), tmp_path)
    assert {(variant.metric, variant.lower_is_better) for variant in jobs.variants} == {("accuracy", False)}
    assert {(variant.metric, variant.lower_is_better) for variant in variants(suite(text_file))} == {("bpb", True)}
    for job, right in zip(jobs.of(jobs.variants[0], "search"), (0.25, 0.5)):
        job.summary, job.values = {"ranking_metric": "bpb", "lower_is_better": True}, {"bpb": 8.0 - right, "accuracy": right}
        job.state = "done"
    assert jobs.chosen_rate(jobs.variants[0]) == 1e-2
    column = table(jobs)["columns"][0]
    assert column["key"] == "accuracy" and column["lower_is_better"] is False
    with pytest.raises(ConfigError, match=r"entry 'one': metric = 'loss_next': .*loss, bpb, perplexity, accuracy"):
        variants(suite(text_file, metric="loss_next"))


OWN = "from treadle.models.transformer import Transformer\n\n\nclass Mine(Transformer):\n    arch = 'mine'\n"


def test_a_file_of_code_that_is_edited_is_another_architecture(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No job of it is read from before; those of entries that do not name it are."""
    monkeypatch.setenv("TREADLE_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(trusted_code, "_allowed", set(trusted_code._allowed))
    mine = tmp_path / "mine.py"

    def folders(text: str) -> dict[str, str]:
        mine.write_text(text)
        trusted_code.allow(mine)
        asked = suite(text_file, entries=[{"label": "dense"}, {"label": "mine", "architecture": f"{mine}:Mine"}], learning_rates=[1e-3, 1e-2],
                      probes={"names": ["copy"], "parameters": 20_000}, seeds=1)  # fmt: skip
        jobs = Jobs(asked, variants(asked), tmp_path / "out")
        found = {}
        while (command := jobs.take()) is not None:
            job = command.work
            job.state, job.summary, job.values = "done", {}, {"bpb": 1.0}
            assert job.folder is not None
            found[job.label] = job.folder.name
        return found

    before, after = folders(OWN), folders(OWN + "    # edited\n")
    assert before.keys() == after.keys() and len(before) == 2 * (1 + 2 + 1 + 1)  # measured, two rates, a seed and a probe each
    assert {label for label in before if before[label] == after[label]} == {label for label in before if label.startswith("dense")}
    assert folders(OWN) == before


def told(job: Job, loss: float | None) -> None:
    """As its process had ended with it; None: diverged."""
    job.state = "done" if loss is not None else "failed"
    job.summary, job.values = ({}, {"bpb": loss}) if loss is not None else (None, None)


@pytest.mark.parametrize(("losses", "tried"), [
    ([3.0, 2.0, 2.5, 1.0], 3), ([1.9, 2.0, 1.5, 4.0], 2), ([4.0, 3.0, 2.5, 2.7], 4), ([4.0, 3.0, 2.5, 2.4], 4), ([2.0, None, 1.0], 2),
    ([3.0, 2.0], 2), ([2.0, 2.0, 1.0], 2),
])  # fmt: skip
def test_a_grid_of_rates_is_searched_upwards_until_it_gets_worse(losses: list[float | None], tried: int, text_file: Path, tmp_path: Path) -> None:
    rates = [1e-3, 3e-3, 8e-3, 2e-2][: len(losses)]
    asked = suite(text_file, entries=[{"label": "one"}], learning_rates=rates[::-1], measure=False, seeds=1)  # in any order
    jobs = Jobs(asked, variants(asked), tmp_path)
    assert jobs.shrinks == (len(rates) > 2)
    seen = []
    while (command := jobs.take()) is not None and command.work.kind == "search":
        seen.append(command.work.learning_rate)
        told(command.work, losses[rates.index(seen[-1])])
    assert sorted(seen) == rates[:tried]
    assert command is not None and command.work.kind == "run"
    assert command.work.learning_rate == min((loss, rate) for loss, rate in zip(losses[:tried], rates) if loss is not None)[1]
    assert [job.kind for job in jobs.all] == ["search"] * tried + ["run"]  # the table knows nothing of the others


def test_a_grid_that_trains_nowhere_fails_its_runs(text_file: Path, tmp_path: Path) -> None:
    asked = suite(text_file, entries=[{"label": "one"}], learning_rates=[1e-3, 3e-3, 8e-3], measure=False, seeds=1)
    jobs = Jobs(asked, variants(asked), tmp_path)
    while (command := jobs.take()) is not None:
        told(command.work, None)
    assert [(job.kind, job.state) for job in jobs.all] == [("search", "failed"), ("search", "failed"), ("run", "failed")]


def test_two_workers_try_the_two_lowest_before_they_go_on(text_file: Path, tmp_path: Path) -> None:
    asked = suite(text_file, entries=[{"label": "one"}], learning_rates=[1e-3, 3e-3, 8e-3, 2e-2], measure=False, seeds=1)
    jobs = Jobs(asked, variants(asked), tmp_path)
    first, second = jobs.take(), jobs.take()
    assert first is not None and second is not None and jobs.take() is None
    told(first.work, 2.0)
    assert jobs.take() is None
    told(second.work, 1.9)
    third = jobs.take()
    assert third is not None and third.work.learning_rate == 8e-3


def test_the_built_in_suites_are_sound() -> None:
    assert set(builtin_suites()) >= {"architectures", "quick"}
    for name in builtin_suites():
        found = variants(read_suite(name))
        assert all(abs(v.parameters / found[0].parameters - 1) < 0.04 for v in found) and len({v.fingerprint for v in found}) == 1
    with pytest.raises(ConfigError, match="architectures"):
        read_suite("architecture")
