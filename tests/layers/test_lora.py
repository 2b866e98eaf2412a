"""Adapters on linear layers: what they compute and whom they train, in every architecture that has linear layers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.contracts.conftest import CASES, PURE, make, random_ids
from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.layers.lora import AdaptedLinear, FrozenLinear, is_adapter
from treadle.models.adapters import (
    adaptable,
    adapted_layers,
    adapters_off,
    add_adapters,
    load_base,
    merge,
    merged,
    read_in_place,
    targets,
)
from treadle.models.base import Model, build
from treadle.models.settings import AdapterSettings
from treadle.objectives.base import ModelWithObjective
from treadle.objectives.next_token import NextToken
from treadle.ops.packed_linear import quantize

TERNARY = [("hgrn_bit", 0), ("hgrn_bit", 1), ("hnet", 0)]  # nothing to adapt
ADAPTED = [case for case in CASES if case not in PURE and case not in TERNARY and case != ("hnet", 2)]
every_adapted = pytest.mark.parametrize("case", ADAPTED, ids=lambda case: f"{case[0]}-{case[1]}")


def adapted(case: tuple[str, int], kind: str = "fp32", **keys: object) -> tuple[Model, Model, AdapterSettings]:
    """(a model with adapters that do something, its base, their settings)."""
    base = make(*case).eval()
    settings = AdapterSettings(lora_rank=4, base_precision=kind, **keys)
    model = copy.deepcopy(base)
    add_adapters(model, settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval(), base, settings


def logits(model: Model, batch: Batch) -> Tensor:
    out = model(batch).logits
    assert out is not None
    return out.detach()


def loss_of(model: Model, batch: Batch) -> Tensor:
    parts = ModelWithObjective(model, NextToken())(batch)
    return sum((term.total for term in parts.losses.values()), torch.zeros(()))


@every_adapted
def test_merged_weights_give_the_adapted_model(case: tuple[str, int]) -> None:
    model, base, settings = adapted(case)
    batch = Batch.from_ids(random_ids(2, 20))
    with_adapters, without = logits(model, batch), logits(base, batch)
    assert (with_adapters - without).abs().max() > 1e-3
    with adapters_off(model):
        torch.testing.assert_close(logits(model, batch), without, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(logits(model, batch), with_adapters, atol=0, rtol=0)  # on again
    trained = {name: tensor.detach() for name, tensor in model.trained_weights().items()}
    assert trained and all(is_adapter(name) for name in trained)
    base.load_weights(merged(dict(base.named_weights()), trained, settings, list(adaptable(base))))
    torch.testing.assert_close(logits(base, batch), with_adapters, atol=1e-5, rtol=1e-5)
    merge(model)
    assert not model.adapted and not adapted_layers(model) and model.named_weights().keys() == base.named_weights().keys()
    torch.testing.assert_close(logits(model, batch), with_adapters, atol=1e-5, rtol=1e-5)


@every_adapted
def test_gradients_are_those_of_a_plain_computation(case: tuple[str, int]) -> None:
    """Against autograd through W + s B A of every layer, put into the base by torch.func."""
    model, base, _ = adapted(case)
    batch = Batch.for_training(random_ids(2, 18))
    loss = loss_of(model, batch)
    loss.backward()
    leaves = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if is_adapter(n)}
    whole = {n: p.detach() for n, p in base.named_parameters()}
    for name, layer in adapted_layers(model).items():
        whole[f"{name}.weight"] = whole[f"{name}.weight"] + layer.scale * (leaves[f"{name}.lora_B"] @ leaves[f"{name}.lora_A"])

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = base

        def forward(self, batch: Batch) -> Tensor:
            return loss_of(self.model, batch)

    plain = torch.func.functional_call(Loss(), {f"model.{n}": t for n, t in whole.items()}, (batch,))
    torch.testing.assert_close(loss.detach(), plain.detach(), atol=1e-4, rtol=1e-5)
    wanted = dict(zip(leaves, torch.autograd.grad(plain, list(leaves.values()))))
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, wanted[name], atol=2e-4, rtol=2e-3, msg=name)
        else:
            assert parameter.grad is None and not parameter.requires_grad, name


@every_adapted
def test_decoding_is_the_full_forward(case: tuple[str, int]) -> None:
    model, _, _ = adapted(case)
    if not model.capabilities.decodes:
        pytest.skip(f"{model.arch} does not decode")
    ids = random_ids(2, 12)
    full, state, parts = logits(model, Batch.from_ids(ids)), model.new_state(2, 12), []
    with torch.no_grad():
        for size, at in ((5, 0), (1, 5), (6, 6)):
            out = model(Batch.from_ids(ids[:, at : at + size]), state=state)
            parts.append(out.logits)
            state = out.state
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-5, rtol=1e-4)


@every_adapted
def test_the_start_is_the_base_and_is_fixed_by_seed_and_name(case: tuple[str, int]) -> None:
    """Allocated from the meta device as a run does it: A by (seed, name), B at 0, the base's names unchanged."""
    base, settings = make(*case).eval(), AdapterSettings(lora_rank=4)
    made = []
    for seed in (0, 0, 1):
        with torch.device("meta"):
            model = type(base)(base.config)
        add_adapters(model, settings)
        model.materialise(seed)
        load_base(model, {name: tensor.clone() for name, tensor in base.named_weights().items()})
        made.append(model.eval())
    batch = Batch.from_ids(random_ids(2, 16))
    torch.testing.assert_close(logits(made[0], batch), logits(base, batch), atol=1e-6, rtol=1e-5)
    assert base.named_weights().keys() == {n for n in made[0].named_weights() if not is_adapter(n)}
    first, again, other = ({n: p for n, p in m.named_parameters() if n.endswith("lora_A")} for m in made)
    assert all(torch.equal(first[n], again[n]) and not torch.equal(first[n], other[n]) for n in first)
    assert all(not p.any() for n, p in made[0].named_parameters() if n.endswith("lora_B"))
    add_adapters(base, settings)  # of a model that has its memory: the same
    assert all(torch.equal(p, first[n]) for n, p in base.named_parameters() if n.endswith("lora_A"))


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("case", [("transformer", 0), ("transformer", 1), ("shc", 0), ("ssm", 0), ("inl", 0), ("hnet", 3)], ids=str)
def test_a_base_in_fewer_bits(case: tuple[str, int], kind: str) -> None:
    """The weights are rounded, and nothing else: the same as an fp32 base of these weights, gradients too."""
    model, base, settings = adapted(case, kind)
    rounded = copy.deepcopy(base)
    with torch.no_grad():
        for layer in adaptable(rounded).values():
            layer.weight.copy_(quantize(layer.weight, kind).dequantize())
    add_adapters(rounded, AdapterSettings(lora_rank=4))
    rounded.load_weights(model.trained_weights())
    batch = Batch.for_training(random_ids(2, 18))
    torch.testing.assert_close(logits(model, batch), logits(rounded, batch), atol=1e-5, rtol=1e-5)
    for each in (model, rounded):
        loss_of(each, batch).backward()
    for name, parameter in rounded.named_parameters():
        if is_adapter(name):
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, atol=1e-4, rtol=1e-3, msg=name)
    held = sum(layer.held.nbytes for layer in model.modules() if isinstance(layer, FrozenLinear))
    whole = sum(4 * layer.held.numel() for layer in model.modules() if isinstance(layer, FrozenLinear))
    assert held * {"bf16": 2, "int8": 4}[kind] == whole
    trained = {name: tensor.detach() for name, tensor in model.trained_weights().items()}
    base.load_weights(merged(dict(base.named_weights()), trained, settings, list(adaptable(base))))
    torch.testing.assert_close(logits(base, batch), logits(model, batch), atol=1e-5, rtol=1e-5)


def test_no_copy_of_a_frozen_weight_outlives_its_product() -> None:
    """What the graph of a layer in bf16 keeps: the input, x A^T, and the weight as it is held."""
    layer = nn.Linear(64, 96, bias=False)
    AdaptedLinear.take(layer, "bf16")
    assert isinstance(layer, AdaptedLinear)
    layer.adapt(4, 2.0, 0.0)
    kept: list[Tensor] = []
    x = torch.randn(10, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    own = {layer.held.data_ptr(), x.data_ptr(), layer.lora_A.data_ptr(), layer.lora_B.data_ptr()}
    others = sorted(t.numel() for t in kept if t.data_ptr() not in own)
    assert others == [40, 4 * 96]  # x A^T [10, 4] and s B [96, 4]


def with_dropout(share: float) -> AdaptedLinear:
    """A layer [16, 32] with an adapter of rank 4 that is not zero."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 16)
    AdaptedLinear.take(layer, "fp32")
    assert isinstance(layer, AdaptedLinear)
    layer.adapt(4, 0.5, share)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    return layer


def test_dropout_is_of_the_adapter_alone_and_in_training_alone() -> None:
    layer = with_dropout(0.25)
    x = torch.randn(7, 32)
    torch.manual_seed(3)
    found = layer.train()(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.25)
    expected = F.linear(x, layer.base_weight(), layer.bias) + 0.5 * (dropped @ layer.lora_A.t() @ layer.lora_B.t())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layer.eval()(x), F.linear(x, layer.weight, layer.bias))


@every_adapted
def test_layers_that_dropout_does_not_reach_are_known(case: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that no forward pass calls, and no others; a class says which of its layers it reads."""
    model, _, _ = adapted(case, lora_dropout=0.3)
    called, factors = set(), AdaptedLinear.factors
    monkeypatch.setattr(AdaptedLinear, "factors", lambda layer, x: called.add(id(layer)) or factors(layer, x))
    loss_of(model.train(), Batch.for_training(random_ids(2, 18)))
    assert list(read_in_place(model)) == [name for name, layer in adapted_layers(model).items() if id(layer) not in called]


def test_gradients_with_dropout_bias_and_autocast() -> None:
    layer = with_dropout(0.5)
    x, slope = torch.randn(3, 5, 32, requires_grad=True), torch.randn(3, 5, 16)
    for kind, atol in ((torch.float32, 1e-5), (torch.bfloat16, 0.15)):
        with torch.autocast("cpu", dtype=kind, enabled=kind != torch.float32):
            torch.manual_seed(5)
            y = layer.train()(x)
        assert y.dtype == kind
        found = torch.autograd.grad((y.float() * slope).sum(), [x, layer.lora_A, layer.lora_B])
        torch.manual_seed(5)
        plain = F.linear(x, layer.base_weight(), layer.bias) + 0.5 * (F.dropout(x, 0.5) @ layer.lora_A.t() @ layer.lora_B.t())
        for a, b in zip(found, torch.autograd.grad((plain * slope).sum(), [x, layer.lora_A, layer.lora_B])):
            torch.testing.assert_close(a, b, atol=atol * float(b.abs().max()) / 4, rtol=atol)


def test_the_scale_is_that_of_lora_and_of_rslora() -> None:
    def scale(**keys: object) -> float:
        model = build("transformer", hidden_size=32, num_layers=1, num_heads=2)
        add_adapters(model, AdapterSettings(**keys))
        return next(iter(adapted_layers(model).values())).scale

    assert scale(lora_rank=8, lora_alpha=16.0) == 2.0
    assert scale(lora_rank=16, lora_alpha=8.0, use_rslora=True) == 2.0
    assert scale(lora_rank=5) == 2.0  # alpha is twice the rank where nobody says it


def test_targets_by_ends_patterns_and_transformers_names() -> None:
    model = build("transformer", hidden_size=32, num_layers=2, num_heads=2)
    assert targets(model, ["all-linear"]) == list(adaptable(model)) and "head" not in adaptable(model)
    assert targets(model, ["query"]) == ["layers.0.attention.query", "layers.1.attention.query"]
    assert targets(model, ["q_proj", "self_attn.v_proj"]) == targets(model, ["query", "attention.value"])
    assert targets(model, ["layers.1.mlp.*"]) == ["layers.1.mlp.gate", "layers.1.mlp.up", "layers.1.mlp.down"]
    add_adapters(model, AdapterSettings(lora_rank=2, lora_targets=["mlp.down"], base_precision="bf16"))
    assert list(adapted_layers(model)) == ["layers.0.mlp.down", "layers.1.mlp.down"]
    assert isinstance(model.get_submodule("layers.0.mlp.up"), FrozenLinear)  # held in bf16 as well


@pytest.mark.parametrize(
    ("arch", "wanted", "words"),
    [
        ("transformer", "querry", "did you mean 'query'"),
        ("transformer", "lm_head", "the head 'lm_head' is not adapted"),
        ("hgrn_bit", "all-linear", "its linear layers are ternary.*leave --lora_rank out.*ternary = false"),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_the_reason(arch: str, wanted: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        add_adapters(build(arch, hidden_size=32, num_layers=1), AdapterSettings(lora_rank=2, lora_targets=[wanted]))


def test_a_ternary_layer_beside_others_is_refused_by_name() -> None:
    model = make("hnet", 0)
    with pytest.raises(ConfigError, match=r"'mlp.down' is a ternary layer.*these can be adapted: query, key"):
        add_adapters(model, AdapterSettings(lora_rank=2, lora_targets=["mlp.down"]))


def test_adapters_twice_or_without_a_rank_are_refused() -> None:
    model = make("transformer", 0)
    with pytest.raises(ConfigError, match="--lora_rank 8"):
        add_adapters(model, AdapterSettings())
    add_adapters(model, AdapterSettings(lora_rank=2))
    with pytest.raises(ConfigError, match="has adapters already"):
        add_adapters(model, AdapterSettings(lora_rank=2))
