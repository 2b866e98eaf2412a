"""The contracts that every registered model keeps (docs/models.md). (8 runs here in one process, and with kill -9 in
tests/training/test_resume.py; 7, several processes, is test_parallel.py.)"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import make_text
from treadle.data.batch import IGNORE, Batch
from treadle.models.base import Model, build_from, from_pretrained
from treadle.objectives.base import ModelWithObjective
from treadle.objectives.next_token import NextToken
from treadle.training.optim import Optimizers
from treadle.training.settings import OptimSettings
from treadle.training.step import Stepper

from .conftest import every_model_but_pure_mixers, first_shapes_are_usual, make, needs, random_ids


def logits(model: Model, batch: Batch) -> torch.Tensor:
    out = model(batch).logits
    assert out is not None
    return out.detach()


def test_01_causal(model: Model) -> None:
    needs(model, "causal")
    ids = random_ids(2, 20)
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 61
    before, after = logits(model, Batch.from_ids(ids)), logits(model, Batch.from_ids(changed))
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])  # and the change is seen from there on


def test_02_a_row_alone_is_the_row_in_a_batch(model: Model) -> None:
    ids = random_ids(4, 17)
    together = logits(model, Batch.from_ids(ids))
    for row in range(4):
        alone = logits(model, Batch.from_ids(ids[row : row + 1]))
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunks", [[1] * 20, [7, 1, 12], [20]], ids=["tokens", "chunks", "prefill"])
def test_03_decoding_is_the_full_forward(model: Model, chunks: list[int]) -> None:
    needs(model, "decodes")
    ids = random_ids(3, 20)
    full = logits(model, Batch.from_ids(ids))
    state, at, parts = model.new_state(3, 20), 0, []
    bytes_at_start = state.nbytes
    with torch.no_grad():
        for size in chunks:
            out = model(Batch.from_ids(ids[:, at : at + size]), state=state)
            parts.append(out.logits)
            state, at = out.state, at + size
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=2e-5, rtol=1e-4)
    assert state.nbytes == bytes_at_start == model.state_bytes(3, 20)


def test_03_decoding_left_and_right_padded(model: Model) -> None:
    needs(model, "decodes")
    ids, lengths = random_ids(3, 12), [12, 7, 3]
    padded, doc_ids = torch.zeros(3, 12, dtype=torch.int64), torch.full((3, 12), -1)
    for row, length in enumerate(lengths):
        padded[row, 12 - length :] = ids[row, :length]
        doc_ids[row, 12 - length :] = 0
    following = random_ids(3, 4, seed=5)
    with torch.no_grad():
        state = model.new_state(3, 16)
        state = model(Batch.from_ids(padded, doc_ids=doc_ids), state=state).state
        got = model(Batch.from_ids(following), state=state).logits
        for row, length in enumerate(lengths):
            whole = Batch.from_ids(torch.cat([ids[row, :length], following[row]]))
            torch.testing.assert_close(got[row], logits(model, whole)[0, length:], atol=2e-5, rtol=1e-4)


def test_03_padding_leaves_a_state_unchanged_bit_for_bit(model: Model) -> None:
    needs(model, "decodes")
    with torch.no_grad():
        state = model(Batch.from_ids(random_ids(2, 6)), state=model.new_state(2, 12)).state
        kept = state.clone()
        pads = Batch.from_ids(random_ids(2, 3, seed=9), doc_ids=torch.tensor([[-1, -1, -1], [0, -1, -1]]))
        after = model(pads, state=state).state
    assert after.lengths.tolist() == [6, 7]
    for old, new in zip(kept.select([0]).layers, after.select([0]).layers):
        for name, value in vars(old).items():
            assert torch.equal(value, getattr(new, name)), name


def test_03_states_can_be_selected(model: Model) -> None:
    needs(model, "decodes")
    ids, more = random_ids(3, 5), random_ids(3, 2, seed=3)
    with torch.no_grad():
        state = model(Batch.from_ids(ids), state=model.new_state(3, 8)).state
        picked = model(Batch.from_ids(more[[2, 0]]), state=state.select([2, 0])).logits
        whole = model(Batch.from_ids(more), state=state).logits
    torch.testing.assert_close(picked, whole[[2, 0]], atol=1e-5, rtol=1e-4)


def test_03_rows_of_different_lengths_are_joined_and_replaced(model: Model) -> None:
    needs(model, "decodes")
    ids, more = random_ids(4, 9), random_ids(3, 2, seed=3)
    with torch.no_grad():
        states = [model(Batch.from_ids(ids[row : row + 1, :length]), state=model.new_state(1, 16)).state for row, length in enumerate((9, 4, 6, 2))]
        alone = [model(Batch.from_ids(more[row : row + 1]), state=states[of].clone()).logits for row, of in enumerate((0, 3, 2))]
        kept = states[0].clone()
        state = states[0].joined(states[1], states[2])
        state.put([1], states[3])
        together = model(Batch.from_ids(more), state=state)
    torch.testing.assert_close(together.logits, torch.cat(alone), atol=2e-5, rtol=1e-4)
    assert together.state.lengths.tolist() == together.state.host_lengths == [11, 4, 8]
    for old, new in zip(kept.layers, states[0].layers):  # what was joined is left as it was
        assert all(torch.equal(value, getattr(new, name)) for name, value in vars(old).items())


@pytest.mark.parametrize("with_segments", [True, False], ids=["segments", "mask"])
def test_04_packed_documents_are_isolated(model: Model, with_segments: bool) -> None:
    needs(model, "packs")
    ids = random_ids(2, 24)
    doc_ids = torch.tensor([[0] * 9 + [1] * 10 + [2] * 5, [0] * 20 + [-1] * 4])

    def run(values: torch.Tensor) -> torch.Tensor:
        batch = Batch.from_ids(values, doc_ids=doc_ids)
        if not with_segments:
            batch.segments = None
        return logits(model, batch)

    packed = run(ids)
    changed = ids.clone()
    changed[0, 9:19] = (changed[0, 9:19] + 7) % 61
    other = run(changed)
    for row, positions in ((0, slice(0, 9)), (0, slice(19, None)), (1, slice(0, 20))):
        # The text decides how many positions an inner stage has, and with them how products of floats are blocked.
        bound = 1e-6 if model.capabilities.dynamic_lengths and not model.capabilities.rounds else 0.0
        assert (packed[row, positions] - other[row, positions]).abs().max() <= bound
    assert not torch.allclose(packed[0, 9:19], other[0, 9:19])
    for row, start, stop in ((0, 0, 9), (0, 9, 19), (0, 19, 24), (1, 0, 20)):
        alone = logits(model, Batch.from_ids(ids[row, start:stop]))
        torch.testing.assert_close(packed[row, start:stop], alone[0], atol=1e-5, rtol=1e-4)


def test_04_packed_gradients_are_those_of_separate_documents(model: Model) -> None:
    needs(model, "packs")
    ids = random_ids(1, 20)
    doc_ids = torch.tensor([[0] * 8 + [1] * 9 + [-1] * 3])
    objective = NextToken()
    objective(model, Batch.for_training(ids, doc_ids=doc_ids)).losses["next_token"].total.backward()
    packed = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for start, stop in ((0, 8), (8, 17)):
        objective(model, Batch.for_training(ids[:, start:stop])).losses["next_token"].total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_05_sums_add_up_over_micro_batches(model: Model) -> None:
    doc_ids = torch.zeros(4, 16, dtype=torch.int64)
    doc_ids[1, 9:] = -1
    batch = Batch.for_training(random_ids(4, 16), doc_ids=doc_ids)
    objective = NextToken()
    whole = objective(model, batch).losses
    parts = [objective(model, batch.rows(i, i + 1)).losses for i in range(4)]
    for name, part in whole.items():
        torch.testing.assert_close(part.total, sum(p[name].total for p in parts), atol=1e-4, rtol=1e-5)
    assert sum(batch.rows(i, i + 1).counts["labels"] for i in range(4)) == batch.counts["labels"] == 15 * 3 + 8


def test_06_meta_initialisation_is_direct_initialisation(case: tuple[str, int]) -> None:
    name, number = case
    direct, again, other = make(name, number), make(name, number), make(name, number, seed=1)
    with torch.device("meta"):
        late = type(direct)(direct.config)  # type: ignore[call-arg]
    late.materialise(0)
    differ = False
    for (n, a), (_, b), (_, c), (_, d) in zip(*(m.named_parameters() for m in (direct, again, late, other))):
        assert torch.equal(a, b) and torch.equal(a, c), n
        differ = differ or not torch.equal(a, d)
    assert differ


@every_model_but_pure_mixers
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_08_resume_is_bit_equal(case: tuple[str, int], optimizer: str, tmp_path: Path) -> None:
    """Six steps in one go, and three and three over a checkpoint, with packing and accumulation: equal bits."""
    import json

    import treadle
    from treadle.checkpoint.layout import checkpoint_name
    from treadle.data.base import Dataset

    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"text": make_text(1 + n % 4, seed=n)}) for n in range(40)))
    data = Dataset.load(str(path), "byte", 48, packing="best_fit")

    def trainer(folder: str, steps: int, resume: bool = False) -> treadle.Trainer:
        config = treadle.TrainConfig(
            **{"output_dir": str(tmp_path / folder), "max_steps": steps, "batch_size": 2, "optim.name": optimizer,
               "gradient_accumulation_steps": 3, "report_to": ["jsonl"], "lr_scheduler_type": "constant"}
        )  # fmt: skip
        return treadle.Trainer(make(*case, vocab_size=256), data, config=config, resume=resume)

    whole = trainer("whole", 6)
    whole.train()
    trainer("parts", 3).train()
    rest = trainer("parts", 6, resume=True)
    rest.load_checkpoint(tmp_path / "parts" / "checkpoints" / checkpoint_name(3))
    rest.train()
    for (name, a), (_, b) in zip(whole.model.named_parameters(), rest.model.named_parameters()):
        assert torch.equal(a, b), name
    ours, theirs = whole.assembly.optimizers.state_tensors(), rest.assembly.optimizers.state_tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[k]) for k, t in ours.items())


def test_09_flops_agree_with_the_counter(model: Model) -> None:
    if model.capabilities.dynamic_lengths:
        pytest.skip(f"{model.arch} declares dynamic_lengths: what a batch costs depends on its text")
    batch = Batch.from_ids(random_ids(3, 32))
    with FlopCounterMode(display=False) as counter:
        model(batch)
    assert counter.get_total_flops() == 3 * model.flops(32)


def test_08_an_evaluation_sees_the_weights_of_its_step(case: tuple[str, int]) -> None:
    """Whatever a model keeps from one evaluation to the next, made of its weights."""
    model = make(*case)
    stepper = Stepper(ModelWithObjective(model, NextToken()), Optimizers(model, OptimSettings()), seed=0, precision="fp32", max_grad_norm=1.0,
                      loss_weights={})  # fmt: skip
    batch, found = Batch.for_training(random_ids(2, 20)), []
    for step in range(3):
        stepper.run(step, [batch], 1e-2)
        model.eval()
        with torch.no_grad():
            found.append(model(batch).logits)
            fresh = make(*case).eval()
            fresh.load_weights(model.named_weights())
            torch.testing.assert_close(found[-1], fresh(batch).logits, atol=1e-6, rtol=1e-6)
        model.train()
    assert not torch.equal(found[0], found[2])


def test_10_checkpointing_changes_no_gradient_and_saves_memory(case: tuple[str, int]) -> None:
    found = []
    for on in (False, True):
        model = make(*case, dropout=0.1).train() if case[0] == "transformer" else make(*case).train()
        for block in model.blocks():
            block.gradient_checkpointing = on  # type: ignore[assignment]
        saved = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += tensor.nbytes
            return tensor

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            total = NextToken()(model, Batch.for_training(random_ids(2, 48))).losses["next_token"].total
        total.backward()
        found.append((saved, {n: p.grad.clone() for n, p in model.named_parameters()}))
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], atol=1e-6, rtol=1e-5, msg=name)
    assert found[1][0] < 0.6 * found[0][0]


def test_11_export_and_import_are_bit_equal(model: Model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    back = from_pretrained(tmp_path)
    assert back.config == model.config
    ours, theirs = model.named_weights(), back.named_weights()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    batch = Batch.from_ids(random_ids(2, 10))
    assert torch.equal(logits(model, batch), logits(back.eval(), batch))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_12_a_low_precision_step_is_finite(case: tuple[str, int], precision: str) -> None:
    model = make(*case)
    optimizers = Optimizers(model, OptimSettings())
    stepper = Stepper(
        ModelWithObjective(model, NextToken()), optimizers, seed=0, precision=precision, max_grad_norm=1.0, loss_weights={}
    )
    for step in range(3):
        result = stepper.run(step, [Batch.for_training(random_ids(4, 24))], 1e-3)
        assert not result.skipped and result.grad_norm > 0
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@first_shapes_are_usual
def test_13_it_learns(case: tuple[str, int]) -> None:
    """150 steps on real text beat the unigram entropy, and the model has not learned to repeat its input."""
    import numpy as np

    model = make(*case, vocab_size=256)
    data = np.frombuffer(make_text(600).encode(), dtype=np.uint8)
    counts = np.bincount(data, minlength=256) / len(data)
    unigram = -(counts[counts > 0] * np.log(counts[counts > 0])).sum()
    stepper = Stepper(ModelWithObjective(model, NextToken()), Optimizers(model, OptimSettings()), seed=0, precision="fp32",
                      max_grad_norm=1.0, loss_weights={})  # fmt: skip
    generator = np.random.default_rng(0)

    def batch() -> Batch:
        starts = generator.integers(0, len(data) - 33, 8)
        return Batch.for_training(torch.from_numpy(np.stack([data[s : s + 32] for s in starts]).astype(np.int64)))

    for step in range(150):
        result = stepper.run(step, [batch()], 5e-3)
    assert float(result.losses["next_token"]) < 0.85 * unigram
    model.eval()
    probe = batch()
    guess = logits(model, probe).argmax(-1)
    assert float((guess == probe.input_ids).float().mean()) < 0.3


def test_14_no_host_reads_in_forward(case: tuple[str, int]) -> None:
    model = make(*case)
    if model.capabilities.dynamic_lengths:
        pytest.skip(f"{model.arch} declares dynamic_lengths: the host has to know how many chunks there are")
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = type(model)(model.config)  # type: ignore[call-arg]
        batch = Batch(
            torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, 16, dtype=torch.int64),
            torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, 16, dtype=torch.int64), segments=((16,), (10, 6)),
        )  # fmt: skip
        out = NextToken()(fake, batch)
        out.losses["next_token"].total.backward()
        assert fake(batch).logits.shape == (2, 16, 61)
        assert mode is not None


@pytest.mark.parametrize("way", ["training", "evaluation", "decoding"])
def test_14_everything_stays_on_the_models_device(case: tuple[str, int], way: str) -> None:
    """With fake tensors of a GPU, which need none: a tensor made on the host by mistake meets one that is not."""
    if not torch.backends.cuda.is_built() or (torch.__version__ < (2, 11) and not torch.cuda.is_available()):
        pytest.skip("fake tensors of a GPU need a torch that was built for one, 2.11 or newer where there is none")
    shape = make(*case)
    if way == "decoding":
        needs(shape, "decodes")
    with FakeTensorMode(allow_non_fake_inputs=False), torch.set_grad_enabled(way == "training"):
        with torch.device("cuda"):
            model = type(shape)(shape.config).train(way == "training")  # type: ignore[call-arg]
            ids, doc_ids = torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, 16, dtype=torch.int64)
        if way == "decoding":
            state = model.new_state(2, 20)
            for at in (slice(0, 5), slice(5, 6)):
                found = model(Batch.from_ids(ids[:, at]), state=state).logits
        else:
            batch = Batch(ids, ids, ids, doc_ids, segments=((16,), (10, 6)))
            found = NextToken()(model, batch).losses["next_token"].total if way == "training" else model(batch).logits
        assert found is not None and found.device.type == "cuda"


def test_15_every_parameter_gets_a_gradient(case: tuple[str, int]) -> None:
    model = make(*case)
    stepper = Stepper(ModelWithObjective(model, NextToken()), Optimizers(model, OptimSettings()), seed=0, precision="fp32",
                      max_grad_norm=0.0, loss_weights={})  # fmt: skip
    moved: set[str] = set()
    for step in range(5):
        stepper.run(step, [Batch.for_training(random_ids(4, 24, seed=step))], 1e-3)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name
            if bool((parameter.grad != 0).any()):
                moved.add(name)
    assert moved == {name for name, _ in model.named_parameters()}


def test_labels_are_shifted_exactly_once(model: Model) -> None:
    """The loss of a batch is the negative log-probability of the following token, by hand."""
    ids = random_ids(1, 12)
    batch = Batch.for_training(ids)
    assert batch.labels is not None and batch.labels[0, -1] == IGNORE
    logp = logits(model, batch).log_softmax(-1)
    by_hand = -logp[0, torch.arange(11), ids[0, 1:]].sum()
    got = NextToken()(model, batch).losses["next_token"].total
    torch.testing.assert_close(got, by_hand, atol=1e-4, rtol=1e-5)


@every_model_but_pure_mixers
def test_presets_build_on_the_meta_device(case: tuple[str, int]) -> None:
    cls = type(make(*case))
    for preset in cls.Config.presets():
        with torch.device("meta"):
            cls(cls.Config.with_preset(preset))  # type: ignore[call-arg]


def test_seed_and_name_fix_the_weights() -> None:
    """A parameter depends on the seed and its own name alone, so another depth changes no other block."""
    two = build_from(*_transformer(num_layers=2))
    three = build_from(*_transformer(num_layers=3))
    assert torch.equal(two.get_parameter("layers.0.mlp.up.weight"), three.get_parameter("layers.0.mlp.up.weight"))


def _transformer(**keys: int):  # type: ignore[no-untyped-def]
    from treadle.models.transformer import Transformer, TransformerConfig

    return Transformer, TransformerConfig.with_preset(None, hidden_size=32, num_heads=2, **keys)
