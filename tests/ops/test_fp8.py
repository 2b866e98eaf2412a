"""Products of 8-bit floats: the numbers that a GPU multiplies, computed here in fp32, and what a GPU asks of their layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import treadle
from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.layers.fp8 import Fp8Linear
from treadle.layers.linear import outputs
from treadle.models.adapters import add_adapters
from treadle.models.base import build
from treadle.models.settings import AdapterSettings
from treadle.objectives.next_token import NextToken
from treadle.ops import precision
from treadle.ops.fp8 import fp8_linear, gradients, product, quantized
from treadle.recipe import from_leaf_names
from treadle.training.resolve import check_layout, use_fp8

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 2}


def rounded(x: Tensor, kind: torch.dtype, largest: float) -> Tensor:
    """x as an 8-bit format holds it that reaches `largest`, by one scale for all."""
    scale = float(x.abs().max()) / largest
    return (x / scale).to(kind).float() * scale


@pytest.mark.parametrize("rows", [48, 50])
def test_every_product_is_that_of_the_rounded_numbers(rows: int) -> None:
    torch.manual_seed(0)
    x, weight, slope = torch.randn(2, rows // 2, 32) * 3, torch.randn(16, 32) * 0.1, torch.randn(2, rows // 2, 16) * 1e-4
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    out = fp8_linear(*leaves)
    out.backward(slope)
    a, w = rounded(x, torch.float8_e4m3fn, 448.0), rounded(weight, torch.float8_e4m3fn, 448.0)
    g = rounded(slope, torch.float8_e5m2, 57344.0)
    torch.testing.assert_close(out, F.linear(a, w), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(leaves[0].grad, g @ w, atol=1e-9, rtol=1e-5)
    kept = slope if rows % 16 else g  # an odd number of rows is multiplied as it is
    torch.testing.assert_close(leaves[1].grad, kept.flatten(0, 1).t() @ a.flatten(0, 1), atol=1e-8, rtol=1e-4)
    assert float((out.detach() - F.linear(x, weight)).norm() / out.detach().norm()) < 0.05


def test_zeros_and_the_largest_numbers_stay_finite() -> None:
    for x in (torch.zeros(16, 16), torch.full((16, 16), 1e30), torch.full((16, 16), -3e-30)):
        for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
            numbers, scale = quantized(x, kind)
            assert bool((numbers.float() * scale).isfinite().all()), (x[0, 0], kind)


@pytest.mark.parametrize("layout", ["rows", "columns", "expanded"])
@pytest.mark.parametrize("rows", [48, 50])
def test_a_gpu_can_multiply_what_it_is_given(layout: str, rows: int) -> None:
    """torch checks layouts, widths and types of CUDA's products on tensors without contents; gradients come in any layout."""
    x, weight = (torch.empty(n, 32, device="meta") for n in (rows, 64))
    (a, scale_a), (w, scale_w) = (quantized(t.t().contiguous().t(), torch.float8_e4m3fn) for t in (x, weight))
    out = product(a, w, scale_a, scale_w, torch.bfloat16)
    assert out.shape == (rows, 64) and out.dtype == torch.bfloat16
    slope = {"rows": out, "columns": out.t().contiguous().t(), "expanded": out[:1, :1].expand(rows, 64)}[layout]
    of_a, of_w = gradients(slope, a, w, scale_a, scale_w, (True, True))
    assert of_a is not None and of_a.shape == (rows, 32) and of_w is not None and of_w.shape == (64, 32)
    with pytest.raises((RuntimeError, ValueError)):  # the check itself is there
        product(a, w.t().contiguous().t(), scale_a, scale_w, torch.bfloat16)


def test_a_model_changes_its_products_alone() -> None:
    torch.manual_seed(0)
    plain, ours = (build("transformer", style="gpt2", **SMALL, seed=3) for _ in range(2))
    assert use_fp8(ours) == 2 * 6 and list(ours.state_dict()) == list(plain.state_dict())
    assert type(ours.head) is not Fp8Linear
    batch = Batch.for_training(torch.randint(0, 64, (4, 16)))
    torch.testing.assert_close(ours.eval()(batch).logits, plain.eval()(batch).logits, atol=1e-5, rtol=1e-5)
    losses = {}
    for name, model in (("plain", plain), ("ours", ours)):
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
        for _ in range(30):
            part = NextToken()(model, batch).losses["next_token"]
            (part.total / batch.counts["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[name] = float(part.total.detach()) / batch.counts["labels"]
    assert losses["ours"] != losses["plain"] and abs(losses["ours"] - losses["plain"]) < 0.1 and losses["ours"] < 1.5, losses


def test_routers_and_odd_widths_keep_theirs() -> None:
    model = build("shc", **SMALL)
    use_fp8(model)
    assert not any("router" in name for name, module in model.named_modules() if isinstance(module, Fp8Linear))
    odd = build("transformer", **{**SMALL, "hidden_size": 24})
    assert use_fp8(odd) == 0 and all(type(m) is not Fp8Linear for m in odd.modules())
    adapted = build("transformer", **SMALL)
    add_adapters(adapted, AdapterSettings(lora_rank=4, lora_targets=["q_proj", "v_proj"]))
    assert use_fp8(adapted) == 0  # frozen layers beside adapters are of another class


def test_no_rows_are_no_error_and_everybody_knows_what_fp8_computes_in() -> None:
    assert fp8_linear(torch.empty(0, 16), torch.ones(32, 16)).shape == (0, 32)
    assert precision.autocast_dtype("fp8") == torch.bfloat16 and precision.autocast_dtype("fp16") == torch.float16


def test_weights_in_parts_are_refused_by_the_run_and_by_its_plan() -> None:
    for mode in ("none", "ddp"):
        check_layout("fp8", mode)
    check_layout("bf16", "fsdp")
    with pytest.raises(ConfigError, match="fsdp keeps weights in parts: use --precision bf16"):
        treadle.plan(from_leaf_names(precision="fp8", preset="nano", **{"parallel.mode": "fsdp"}), world=2, device="cuda", flops=1e12)
    wide = from_leaf_names(precision="fp8", preset="gpt2", seq_len=256, batch_size=4)
    layouts = treadle.plan(wide, world=2, device="cuda", flops=1e12)["layouts"]
    assert "ddp" in layouts and not {"fsdp", "deepspeed, zero stage 2"} & set(layouts)


def test_a_plan_counts_what_is_kept_in_8_bits() -> None:
    """A block of gpt2 keeps the inputs of its products, six widths without attention's result (which attention keeps in bf16 too), in one
    byte instead of two, and weights in 8 bits, which autocast's copies are not counted for but for those of queries, keys and values."""
    given = {"preset": "gpt2", "seq_len": 256, "batch_size": 16}
    bf16, fp8 = (treadle.plan(from_leaf_names(precision=name, **given), device="cuda", flops=1e12)["blocks"][1]["activations_gb"] * 1e9
                 for name in ("bf16", "fp8"))  # fmt: skip
    fewer, more = 16 * 256 * 768 * (6 - 1), (12 - 2 * 3) * 768**2
    assert fp8 - bf16 == pytest.approx(more - fewer, rel=0.02)


def test_several_products_of_one_input_round_it_once() -> None:
    torch.manual_seed(0)
    x, layers = torch.randn(3, 16, 32), [Fp8Linear(32, n, bias=True) for n in (32, 16, 16)]
    found = torch.cat(outputs(x, *layers), -1)
    whole = fp8_linear(x, torch.cat([layer.weight for layer in layers])) + torch.cat([layer.bias for layer in layers])
    assert torch.equal(found, whole)
    apart = torch.cat([layer(x) for layer in layers], -1)
    assert not torch.equal(found, apart) and float((found - apart).detach().norm() / apart.detach().norm()) < 0.05  # another scale for the weights
    layers[1].register_forward_hook(lambda module, given, made: made + 1.0)
    assert torch.equal(torch.cat(outputs(x, *layers), -1), torch.cat([layer(x) for layer in layers], -1))
    with torch.no_grad():
        assert torch.equal(outputs(x, layers[0], layers[2])[0], F.linear(x, layers[0].weight, layers[0].bias))


def test_where_it_cannot_run_it_says_what_to_type(tmp_path: Path, text_file: Path) -> None:
    for capability, said in (((0, 0), "no GPU"), ((8, 0), "8.0")):
        with pytest.raises(ConfigError, match=f"{said}.*--precision bf16"):
            precision.check_fp8(capability)
    precision.check_fp8((9, 0))
    data = treadle.Dataset.load(str(text_file), tokenizer="byte", seq_len=32)
    with pytest.raises(ConfigError, match="fp8 needs a GPU"):
        treadle.Trainer(build("transformer", **{**SMALL, "vocab_size": 256}), data,
                        config=treadle.TrainConfig(output_dir=str(tmp_path), max_steps=1, precision="fp8", device="cpu")).train()  # fmt: skip
