"""DPO: the loss against a plain computation and against trl's, the reference, adapters, and rows shared by micro-batches."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import treadle
from treadle.data.batch import IGNORE, Batch
from treadle.errors import ConfigError
from treadle.models.adapters import add_adapters
from treadle.models.base import Model
from treadle.models.settings import AdapterSettings
from treadle.objectives.dpo import FOUND, DirectPreference, preference_loss
from treadle.objectives.settings import PreferenceSettings
from treadle.ops.sequence_log_probabilities import sequence_log_probabilities

NO_TEXT: Any = SimpleNamespace(tokenizer=None)  # a dataset that says nothing of tokens
SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
CPU = torch.device("cpu")


def model(seed: int = 0, arch: str = "transformer", **keys: Any) -> Model:
    return treadle.build(arch, seed=seed, **{**SHAPE, **keys})


def pairs(rows: int = 3, seed: int = 0, per_row: int = 1) -> tuple[Batch, list[list[torch.Tensor]]]:
    """A batch whose rows hold `per_row` pairs, and the documents of each row; the first four tokens of each are the prompt."""
    g = torch.Generator().manual_seed(seed)
    ids, documents, labels, whole = [], [], [], []
    for _ in range(rows):
        row, numbers, scored, texts = [], [], [], []
        for number in range(2 * per_row):
            text = torch.randint(0, 64, (int(torch.randint(6, 12, (1,), generator=g)),), generator=g)
            texts.append(text)
            row.append(text)
            numbers.append(torch.full_like(text, number))
            scored.append(torch.cat([torch.full((3,), IGNORE), text[4:], torch.tensor([IGNORE])]))
        left = 24 * per_row - sum(map(len, row))
        ids.append(torch.cat([*row, torch.zeros(left, dtype=torch.int64)]))
        documents.append(torch.cat([*numbers, torch.full((left,), -1)]))
        labels.append(torch.cat([*scored, torch.full((left,), IGNORE)]))
        whole.append(texts)
    return Batch.from_ids(torch.stack(ids), torch.stack(documents), torch.stack(labels)), whole


def plain_log_probability(of: Model, text: torch.Tensor) -> torch.Tensor:
    """Of an answer (what stands behind the first four tokens), each document alone in a batch of its own, in plain PyTorch."""
    logits = of(Batch.from_ids(text)).logits
    assert logits is not None
    return F.log_softmax(logits[0, :-1].float(), -1)[torch.arange(len(text) - 1), text[1:]][3:].sum()


def plain_loss(policy: Model, reference: Model, whole: list[list[torch.Tensor]], beta: float) -> torch.Tensor:
    """The sum over pairs of equation 7 of arXiv 2305.18290, term by term."""
    total = torch.zeros(())
    for row in whole:
        for chosen, rejected in zip(row[::2], row[1::2]):
            better = plain_log_probability(policy, chosen) - plain_log_probability(reference, chosen).detach()
            worse = plain_log_probability(policy, rejected) - plain_log_probability(reference, rejected).detach()
            total = total - torch.log(torch.sigmoid(beta * better - beta * worse))
    return total


@pytest.mark.parametrize("per_row", [1, 2])
@pytest.mark.parametrize("arch", ["transformer", "ssm"])
def test_loss_and_gradients_are_those_of_a_plain_computation(arch: str, per_row: int) -> None:
    policy, reference = model(1, arch), model(2, arch)
    batch, whole = pairs(per_row=per_row)
    objective = DirectPreference(PreferenceSettings(beta=0.3), reference)
    objective.prepare(policy, NO_TEXT, CPU)
    term = objective(policy, batch).losses["dpo"]
    assert term.unit == "pairs" and objective.counts(batch)["pairs"] == 3 * per_row
    term.total.backward()
    ours = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    wanted = plain_loss(policy, reference, whole, 0.3)
    wanted.backward()
    count = 3 * per_row
    assert abs(float((term.total - wanted).detach())) / count < 1e-6
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=2e-6)
    assert all(p.grad is None for p in reference.parameters())


def test_the_metrics_are_means_over_pairs() -> None:
    policy, reference = model(1), model(2)
    batch, whole = pairs(4)
    objective = DirectPreference(PreferenceSettings(beta=0.5), reference)
    objective.prepare(policy, NO_TEXT, CPU)
    with torch.no_grad():
        sums = {name: float(value) for name, value in objective.evaluation_sums(policy, batch).items()}
        found = objective.compute_metrics(sums)
        rewards = [[0.5 * float(plain_log_probability(policy, t) - plain_log_probability(reference, t)) for t in row] for row in whole]
        assert found["loss"] == pytest.approx(float(plain_loss(policy, reference, whole, 0.5)) / 4, abs=1e-6)
    assert found["chosen_reward"] == pytest.approx(sum(c for c, _ in rewards) / 4, abs=1e-5)
    assert found["rejected_reward"] == pytest.approx(sum(r for _, r in rewards) / 4, abs=1e-5)
    assert found["reward_margin"] == pytest.approx(sum(c - r for c, r in rewards) / 4, abs=1e-5)
    assert found["accuracy"] == sum(c > r for c, r in rewards) / 4 and found["pairs"] == 4


def test_a_batch_of_padding_and_uneven_rows_counts_what_is_there() -> None:
    """Rows with one pair, with two and with none (a surplus draw) in one batch are the sum of them alone."""
    policy = model(1)
    objective = DirectPreference(reference=model(2))
    objective.prepare(policy, NO_TEXT, CPU)
    two, one = pairs(1, 3, per_row=2)[0], pairs(1, 4)[0]
    wide = Batch.from_ids(F.pad(one.input_ids, (0, 24)), F.pad(one.doc_ids, (0, 24), value=-1), F.pad(one.labels, (0, 24), value=IGNORE))
    none = Batch.from_ids(torch.zeros(1, 48, dtype=torch.int64), torch.full((1, 48), -1), torch.full((1, 48), IGNORE))
    together = Batch.from_ids(*(torch.cat([getattr(b, name) for b in (two, wide, none)]) for name in ("input_ids", "doc_ids", "labels")))
    assert objective.counts(together)["pairs"] == 3 and objective.counts(none)["pairs"] == 0
    for name in ("dpo", *FOUND):
        apart = sum(float(objective(policy, b).losses[name].total.detach()) for b in (two, one))
        assert float(objective(policy, together).losses[name].total.detach()) == pytest.approx(apart, abs=1e-5)
        assert float(objective(policy, none).losses[name].total.detach()) == 0


def test_a_models_own_losses_ride_along() -> None:
    """A hierarchical model asks for its share of chunks; DPO adds that, in its unit, and the margin knows nothing of it."""
    shape = {"hidden_sizes": [32, 40], "num_blocks": [[1, 0, 1], [1]], "convolution_size": 4, "vocab_size": 64}
    policy, reference = (treadle.build("hnet", seed=seed, **shape) for seed in (1, 2))
    batch, whole = pairs()
    objective = DirectPreference(PreferenceSettings(beta=0.3), reference)
    objective.prepare(policy, NO_TEXT, CPU)
    with torch.no_grad():
        losses = objective(policy, batch).losses
        own = set(losses) - {"dpo", *FOUND}
        assert own and all(losses[name].unit in objective.counts(batch) and losses[name].weight for name in own)
        assert float(losses["dpo"].total) / 3 == pytest.approx(float(plain_loss(policy, reference, whole, 0.3)) / 3, abs=1e-5)
        found = objective.compute_metrics({name: float(v) for name, v in objective.evaluation_sums(policy, batch).items()})
    assert found["loss"] == pytest.approx(float(losses["dpo"].total) / 3) and found["pairs"] == 3


def test_it_starts_at_log_two_and_label_smoothing_is_the_weighted_pair() -> None:
    policy, (batch, _) = model(1), pairs()
    objective = DirectPreference(reference=copy.deepcopy(policy))
    objective.prepare(policy, NO_TEXT, CPU)
    losses = objective(policy, batch).losses
    assert float(losses["dpo"].total.detach()) / 3 == pytest.approx(math.log(2), abs=1e-7)
    assert float(losses["reward_margin"].total) == 0 and float(losses["accuracy"].total) == 0
    a, b, c, d = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    there, back = preference_loss(a, b, c, d, 0.2), preference_loss(b, a, d, c, 0.2)
    torch.testing.assert_close(preference_loss(a, b, c, d, 0.2, 0.1), 0.9 * there + 0.1 * back)


def test_one_step_prefers_what_was_chosen() -> None:
    policy, (batch, _) = model(1), pairs()
    objective = DirectPreference(PreferenceSettings(beta=1.0), copy.deepcopy(policy))
    objective.prepare(policy, NO_TEXT, CPU)
    optimizer = torch.optim.SGD(policy.parameters(), 0.1)
    objective(policy, batch).losses["dpo"].total.backward()
    optimizer.step()
    with torch.no_grad():
        after = objective(policy, batch).losses
    assert float(after["accuracy"].total) == 3 and float(after["dpo"].total) < 3 * math.log(2)


def test_adapters_are_held_to_the_model_without_them() -> None:
    base, policy = (model(1, style="gpt2", dropout=0.5, max_position_embeddings=32) for _ in range(2))
    base.eval()
    add_adapters(policy, AdapterSettings(lora_rank=4, lora_dropout=0.5))
    policy.train()
    with torch.no_grad():
        for number, parameter in enumerate(p for p in policy.parameters() if p.requires_grad):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    batch, whole = pairs()
    objective = DirectPreference()
    objective.prepare(policy, NO_TEXT, CPU)
    assert objective.reference is None
    theirs = objective._references(policy, batch)
    wanted = torch.tensor([[float(plain_log_probability(base, text)) for text in row] for row in whole])
    torch.testing.assert_close(theirs[:, 0], wanted, atol=1e-5, rtol=1e-5)  # no dropout, no adapter
    assert policy.training
    policy.eval()
    torch.testing.assert_close(objective(policy, batch).losses["dpo"].total, plain_loss(policy, base, whole, 0.1), atol=3e-6, rtol=0)


def test_a_reference_is_drawn_from_the_seed_or_given() -> None:
    policy, (batch, _) = model(1), pairs()
    drawn = DirectPreference(PreferenceSettings())
    drawn.starts_from(None, 1)
    drawn.prepare(policy, NO_TEXT, CPU)
    assert drawn.task.reference_seed == 1 and drawn.reference is not None
    assert float(drawn(policy, batch).losses["reward_margin"].total) == 0  # the same weights
    with pytest.raises(ConfigError, match=r"reference=copy.deepcopy\(model\)"):
        DirectPreference().prepare(policy, NO_TEXT, CPU)


def test_rows_that_are_no_pairs_are_refused() -> None:
    policy = model(1)
    objective = DirectPreference(reference=model(1))
    objective.prepare(policy, NO_TEXT, CPU)
    with pytest.raises(ConfigError, match="without its other one"):
        objective(policy, Batch.for_training(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64)))
    with pytest.raises(ConfigError, match="the data: --data"):
        objective(policy, Batch.from_ids(torch.zeros(1, 8, dtype=torch.int64)))


def test_sums_by_document_in_chunks_are_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treadle.ops.cross_entropy.CHUNK_NUMBERS", 1)  # 64 positions at a time
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 100, 8, generator=g), torch.randn(50, 8, generator=g)
    labels = torch.where(torch.rand(3, 100, generator=g) < 0.3, IGNORE, torch.randint(0, 50, (3, 100), generator=g))
    documents = (torch.arange(100) // 40).expand(3, 100)
    grads = []
    for plain in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if plain:
            each = F.log_softmax(5.0 * (F.linear(h, w) / 5.0).tanh(), -1).gather(-1, labels.clamp_min(0)[..., None])[..., 0] * (labels != IGNORE)
            found = torch.stack([(each * (documents == n)).sum(-1) for n in range(3)], -1)
        else:
            found = sequence_log_probabilities(h, w, labels, documents, 3, int((labels != IGNORE).sum()), 5.0)
        (found * torch.arange(9).view(3, 3)).sum().backward()
        grads.append((found.detach(), h.grad, w.grad))
    for ours, wanted in zip(*grads):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-3)




def test_trl_computes_the_same_loss_and_metrics() -> None:
    """trl's own loss (DPOTrainer._compute_loss) on the log-probabilities of each token, without its models and files."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="trl is not installed (pip install trl), whose loss this compares with")
    policy, reference = model(1), model(2)
    batch, whole = pairs(3)
    texts = [row[0] for row in whole] + [row[1] for row in whole]  # chosen, then rejected, as trl has them
    ids = torch.stack([F.pad(text, (0, 12 - len(text))) for text in texts])
    mask = torch.stack([(torch.arange(12) >= 4) & (torch.arange(12) < len(text)) for text in texts]).long()

    def speaks(of: Model) -> Any:
        class Speaks(torch.nn.Module):
            is_gradient_checkpointing = False

            def forward(self, **given: Any) -> SimpleNamespace:
                logits = of(Batch.from_ids(given["input_ids"])).logits
                assert logits is not None
                each = F.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
                return SimpleNamespace(log_probs=each * mask[:, 1:], entropy=each, mean_logits=each, is_top1=each > 0)

        return Speaks()

    alone = SimpleNamespace(device=CPU, gather=lambda value: value, gather_for_metrics=lambda value: value)
    metrics = {"eval": {name: [] for name in ("entropy", "num_tokens", "mean_token_accuracy", "logits/chosen", "logits/rejected", "logps/chosen",
                        "logps/rejected", *(f"rewards/{n}" for n in ("chosen", "rejected", "accuracies", "margins")))}}  # fmt: skip
    ours = speaks(policy).eval()
    trainer = SimpleNamespace(
        model=ours, ref_model=speaks(reference), accelerator=alone, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=False, beta=0.3,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None), f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0],
        label_smoothing=0.0, use_weighting=False, _metrics=metrics, _total_train_tokens=0,
    )  # fmt: skip
    inputs = {"input_ids": ids, "attention_mask": (ids >= 0).long(), "completion_mask": mask}
    with torch.no_grad():
        theirs = dpo_trainer.DPOTrainer._compute_loss(trainer, ours, inputs, False)
        objective = DirectPreference(PreferenceSettings(beta=0.3), reference)
        objective.prepare(policy, NO_TEXT, CPU)
        found = objective.compute_metrics({name: float(value) for name, value in objective.evaluation_sums(policy, batch).items()})
    assert found["loss"] == pytest.approx(float(theirs), abs=1e-6)
    for ours_name, their_name in zip(FOUND, ("margins", "accuracies", "chosen", "rejected")):
        assert found[ours_name] == pytest.approx(metrics["eval"][f"rewards/{their_name}"][0], abs=1e-5)
