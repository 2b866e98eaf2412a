"""Packed weights: the compiled product is the plain one, rows keep their bits, and quantisation loses what it may."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from treadle.errors import ConfigError
from treadle.ops.native import FLAGS, SOURCES
from treadle.ops.packed_linear import FORMATS, PackedMatrix, Quantized, has_pairs, joined, native, quantize

needs_compiler = pytest.mark.skipif(native() is None, reason="no compiled product here")
SHAPES = [(64, 32), (100, 33), (17, 96), (192, 128)]


def made(rows: int, columns: int, kind: str) -> tuple[torch.Tensor, Quantized]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) * 0.05
    return weight, quantize(weight, kind)


# Root mean square error over that of the weights: half an ulp; 1 / (127 sqrt(12)) of a row's largest; 4 bits of normal values
# by groups of 32 (uniform levels, best scale).
@pytest.mark.parametrize(("kind", "bound"), [("fp32", 0.0), ("bf16", 0.0018), ("int8", 0.008), ("int4", 0.083)])
def test_what_quantisation_loses(kind: str, bound: float) -> None:
    weight, quantized = made(192, 128, kind)
    assert quantized.kind == kind and quantized.shape == (192, 128)
    assert float((quantized.dequantize() - weight).norm() / weight.norm()) <= bound


def test_extremes_are_kept() -> None:
    """A group's longest value of either sign is a level; zeros stay zeros; int8's largest is exact to a rounding."""
    weight = torch.zeros(3, 64)
    weight[0, 5], weight[1, 40] = 3.0, -2.0
    for kind in ("int8", "int4"):
        back = quantize(weight, kind).dequantize()
        torch.testing.assert_close(back, weight, rtol=1e-3, atol=0)


def test_widths_without_groups_take_eight_bits() -> None:
    assert made(100, 33, "int4")[1].kind == "int8"


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "not finite"), (-float("inf"), "not finite"), (1e6, "larger than 524032")])
def test_what_four_bits_cannot_hold_is_refused(value: float, what: str) -> None:
    weight = torch.randn(64, 64)
    weight[3, 40] = value
    with pytest.raises(ConfigError, match=f"{what}.*use int8 or bf16"):
        quantize(weight, "int4")
    weight[3, 40] = -5e5
    torch.testing.assert_close(quantize(weight, "int4").dequantize()[3, 40], weight[3, 40], rtol=1e-2, atol=0)


@needs_compiler
@pytest.mark.parametrize("x", [torch.zeros(2, 96), torch.zeros(2, 128, dtype=torch.float64), torch.zeros(2, 128).bfloat16(), torch.zeros(128)])
def test_inputs_of_another_type_or_width_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="takes fp32"):
        PackedMatrix(made(192, 128, "int8")[1]).product(x)


PAIRED = pytest.mark.parametrize("paired", [False, pytest.param(True, marks=pytest.mark.skipif(not has_pairs(), reason="no bf16 pairs here"))])


@needs_compiler
@PAIRED
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (70, 8195)])
def test_the_compiled_product_is_the_plain_one(kind: str, rows: int, columns: int, paired: bool) -> None:
    """In pairs it is that of inputs rounded to bf16."""
    _, quantized = made(rows, columns, kind)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    packed = PackedMatrix(quantized, bias, paired)
    whole = quantized.dequantize()
    assert torch.equal(packed.dequantize(), whole)
    x = torch.randn(143, columns, generator=torch.Generator().manual_seed(2))
    alone = torch.cat([packed.product(row[None]) for row in x])
    read = x.bfloat16() if packed.paired else x
    exact = torch.nn.functional.linear(read.double(), whole.double(), bias.double()).float()
    torch.testing.assert_close(alone, exact, rtol=1e-5, atol=1e-6 if columns < 1000 else 3e-5)
    for count in (2, 3, 15, 16, 24, 128, 143):  # 15 is 8 + 4 + 2 + 1 rows; more than 128 are multiplied in parts
        assert torch.equal(packed.product(x[:count]), alone[:count]), count


@needs_compiler
@pytest.mark.parametrize("processor", ["x86-64", "haswell"])
def test_processors_with_narrower_registers_compute_the_same(processor: str, tmp_path: Path) -> None:
    """Compiled for 4 and for 8 numbers in a register, with and without fused multiplication and addition."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if platform.machine() != "x86_64" or (processor == "haswell" and not all(f" {word}" in flags for word in ("avx2", "fma", "f16c"))):
        pytest.skip(f"this machine does not run programs for {processor}")
    compiler = shutil.which(os.environ.get("CC", "cc")) or "gcc"
    given = [f"-march={processor}" if flag == "-march=native" else flag for flag in FLAGS]
    subprocess.run([compiler, *given, str(SOURCES / "decoding.c"), "-o", str(tmp_path / "d.so"), "-lm"], check=True, capture_output=True)
    library = ctypes.CDLL(str(tmp_path / "d.so"))
    library.product.argtypes, library.product.restype = native().product.argtypes, None
    for kind in FORMATS:
        packed = PackedMatrix(made(100, 96, kind)[1], paired=False)
        x = torch.randn(19, 96, generator=torch.Generator().manual_seed(2))
        native_way = packed.product(x)
        packed._library = library
        y = packed.product(x)
        torch.testing.assert_close(y, native_way, rtol=1e-5, atol=1e-6)
        assert torch.equal(y, torch.cat([packed.product(row[None]) for row in x])), kind


@needs_compiler
@PAIRED
@pytest.mark.parametrize("kind", FORMATS)
def test_threads_change_no_bit(kind: str, paired: bool) -> None:
    packed, x, before = PackedMatrix(made(192, 128, kind)[1], paired=paired), torch.randn(5, 128), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(packed.product(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", FORMATS)
def test_joined_matrices_lie_below_each_other(kind: str) -> None:
    parts = [made(64, 32, kind)[1], quantize(torch.randn(10, 32), kind)]
    assert torch.equal(joined(parts).dequantize(), torch.cat([part.dequantize() for part in parts]))
