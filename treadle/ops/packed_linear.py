"""Weights of linear layers in 16, 8 or 4 bits, for reading only, and their product with a few rows.

bf16: as they are. int8: W[n, k] = s_n q with s_n = max |W[n]| / 127 and q rounded half to even. int4: W[n, k] = s_ng t[c]: a
scale in fp16 for each output n and 32 inputs, and a code c into a table t of 16 values; scale and codes are those of the least
squared error found. fp16 has no small scales: a matrix of weights around 1e-6 loses a tenth more than others, one of 1e-7 half of
itself and smaller ones everything; int8 has no such limit. What is lost is lost by the weights: inputs stay in fp32, or are rounded to
bf16 where the processor multiplies pairs of these (multiplies_pairs), which changes the loss by less than 1e-4 nat.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.errors import ConfigError
from treadle.ops.native import library
from treadle.ops.processor import made_by_amd

FORMATS = ("fp32", "bf16", "int8", "int4")
GROUP = 32  # inputs that share a scale in 4 bits
PANEL = 64  # outputs that lie together (csrc/decoding.c)
PAIRED = 3  # added to a format's number: csrc/pairs.h
# Sixteen levels: the uniform grid, one step longer below zero; a group's scale may be negative, so that its largest value,
# whatever its sign, can be the longest level.
LEVELS = tuple(float(level) for level in range(-8, 8))
LARGEST = 8 * torch.finfo(torch.float16).max  # the longest level times the largest scale
STARTS = (1.0, 0.93, 0.86, 0.79)  # scales tried, as shares of the one that reaches a group's largest value


@dataclass
class Quantized:
    """One matrix W [N, K] as files hold it: codes [N, K] in fp32, bf16 or int8, or uint8 [N, K / 2] (int4; k even in the low
    bits); scales fp32 [N] (int8) or fp16 [N, K / 32] (int4)."""

    kind: str
    codes: Tensor
    scales: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""
        rows, columns = self.codes.shape
        return rows, columns * (2 if self.kind == "int4" else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    def dequantize(self) -> Tensor:
        """W in fp32."""
        if self.scales is None:
            return self.codes.float()
        if self.kind == "int8":
            return self.codes.float() * self.scales[:, None]
        codes = torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(1)
        table = torch.tensor(LEVELS, device=codes.device)
        return (table[codes.long()].unflatten(1, (-1, GROUP)) * self.scales.float()[:, :, None]).flatten(1)


@torch.no_grad()
def quantize(weight: Tensor, kind: str) -> Quantized:
    """W [N, K] in a format of FORMATS; int8 where int4 has no groups (K no multiple of 32). ConfigError for int4 where weights
    are not finite, or beyond 524032."""
    weight = weight.detach().float()
    if kind == "fp32":
        return Quantized(kind, weight)
    if kind == "bf16":
        return Quantized(kind, weight.to(torch.bfloat16))
    if kind == "int4" and weight.shape[1] % GROUP == 0:
        return _four_bits(weight)
    made = [_eight_bits_of(part) for part in _parts(weight)]
    return Quantized("int8", torch.cat([codes for codes, _ in made]), torch.cat([scales for _, scales in made]))


def _parts(weight: Tensor) -> tuple[Tensor, ...]:
    """Rows that are quantised at once, so that what that takes is little beside the matrix: a head of 50,257 tokens has 154 MB."""
    return weight.split(max(1, (1 << 21) // max(1, weight.shape[1])))


def _eight_bits_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(1).clamp_min(1e-30) / 127
    return (weight / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


def stored_bytes(kind: str, shape: tuple[int, int]) -> int:
    """Bytes of codes and scales of a matrix [N, K] in a format, as `quantize` makes them."""
    outputs, inputs = shape
    if kind == "int4" and inputs % GROUP == 0:
        return outputs * inputs // 2 + 2 * outputs * (inputs // GROUP)
    if kind in ("int8", "int4"):
        return outputs * inputs + 4 * outputs
    return outputs * inputs * (4 if kind == "fp32" else 2)


def _four_bits(weight: Tensor) -> Quantized:
    """From several starts, codes and scales improve each other twice: the nearest level of each value, then the scale of
    least squares. Of each group the best is taken."""
    made = [_four_bits_of(part) for part in _parts(weight)]
    return Quantized("int4", torch.cat([codes for codes, _ in made]), torch.cat([scales for _, scales in made]))


def _four_bits_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = weight.unflatten(1, (-1, GROUP))
    place = groups.abs().argmax(-1, keepdim=True)
    longest = groups.gather(-1, place)  # with its sign; NaN where there is one
    if not bool((longest.abs() <= LARGEST).all()):  # no scale would be found, and the weights read as zeros
        what = f"larger than {LARGEST:.0f}" if bool(longest.isfinite().all()) else "not finite"
        raise ConfigError(f"some weights are {what}, which int4 cannot hold: use int8 or bf16")
    best_error = torch.full_like(longest, torch.inf)
    best_scale, best = torch.zeros_like(longest), torch.zeros_like(groups)
    for sign in (1.0, -1.0):
        for share in STARTS:
            scale = longest / (-8.0 * sign) * share if sign > 0 else longest / 7.0 * share
            for turn in range(3):
                scale = scale.half().float()  # as it is stored
                safe = torch.where(scale == 0, 1.0, scale)
                level = (groups / safe).round_().clamp_(-8, 7)
                if turn < 2:
                    scale = (groups * level).sum(-1, keepdim=True) / level.square().sum(-1, keepdim=True).clamp_min(1.0)
            error = (level * scale - groups).square_().sum(-1, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale, best = torch.where(better, scale, best_scale), torch.where(better, level, best)
    codes = (best + 8).to(torch.uint8).flatten(1)
    return codes[:, ::2] | codes[:, 1::2] << 4, best_scale[..., 0].half()


# ---- the compiled product ----


class Matrix(ctypes.Structure):
    """struct matrix of csrc/decoding.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "table", "bias")),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "format")),
    )  # fmt: skip


@functools.cache
def native() -> ctypes.CDLL | None:
    """csrc/decoding.c with its signatures, or None."""
    made = library("decoding")
    if made is not None:
        pointer, size, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        made.product.argtypes = [pointer, pointer, pointer, size, threads]
        made.unpacked.argtypes = [pointer, pointer, size, size, threads]
        made.decoding_step.argtypes = [*[pointer] * 6, size, threads, pointer, pointer, threads]
        made.prompt_attention.argtypes = [pointer, size, pointer, pointer, *[size] * 6, ctypes.c_float, pointer, size, threads]
        made.product.restype = made.unpacked.restype = None
        made.has_pairs.restype = threads
    return made


@functools.cache
def _table() -> Tensor:
    return torch.tensor(LEVELS, dtype=torch.float32, device="cpu")


def _panels(t: Tensor) -> Tensor:
    """[N, K] -> [N / 64, K, 64], N padded with zeros."""
    return F.pad(t, (0, 0, 0, -t.shape[0] % PANEL)).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def _pairs(t: Tensor) -> Tensor:
    """[N, K] -> [N / 64, K / 2, 64, 2], both padded with zeros."""
    padded = F.pad(t, (0, t.shape[1] % 2, 0, -t.shape[0] % PANEL))
    return padded.unflatten(1, (-1, 2)).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def has_pairs() -> bool:
    """Whether this processor multiplies pairs of bf16 numbers, and the compiled product was made for it."""
    made = native()
    return made is not None and bool(made.has_pairs())


@functools.cache
def multiplies_pairs() -> bool:
    """Whether products with packed weights in 16 bits and fewer round their input to bf16 here: where the processor multiplies pairs of
    bf16 numbers and is faster so, which AMD's are (an Intel core multiplies as many numbers a cycle in fp32). By its features, since a
    timing would let the same seed give another text."""
    return has_pairs() and made_by_amd()


class PackedMatrix:
    """A matrix laid out for csrc/decoding.c, with an optional bias [N]; only where `native()`.

    paired: inputs are rounded to bf16 and multiplied two at a time (csrc/pairs.h); where there is that, by default in 16 bits and fewer
    where `multiplies_pairs()`."""

    def __init__(self, quantized: Quantized, bias: Tensor | None = None, paired: bool | None = None) -> None:
        self.kind, self.shape = quantized.kind, quantized.shape
        self.paired = self.kind != "fp32" and (multiplies_pairs() if paired is None else paired)
        if self.paired and not has_pairs():
            raise ValueError("this processor multiplies no pairs of bf16 numbers: paired=False")
        codes, scales = quantized.codes, quantized.scales
        if self.kind == "int8" and scales is not None:
            scales = F.pad(scales.float(), (0, -self.shape[0] % PANEL)).contiguous()
        elif self.kind == "int4" and scales is not None:
            scales = _panels(scales.view(torch.int16))
        self.bias = bias = bias.detach().float().contiguous() if bias is not None else None
        laid_out = _pairs if self.paired and self.kind != "int4" else _panels  # 4 bits are in pairs anyway
        self._kept = (laid_out(codes.view(torch.int16) if self.kind == "bf16" else codes), scales, _table(), bias)
        pointers = (t.data_ptr() if t is not None else None for t in self._kept)
        self.struct = Matrix(*pointers, *self.shape, FORMATS.index(self.kind) + (PAIRED if self.paired else 0))
        self._at, self._library = ctypes.addressof(self.struct), native()

    def product(self, x: Tensor) -> Tensor:
        """x fp32 [M, K] -> fp32 [M, N]; a row has the same bits alone and among others. ValueError for any other x."""
        shape = x.shape  # asked for once: this runs 25 times a token
        if len(shape) != 2 or shape[1] != self.shape[1] or x.dtype is not torch.float32 or not x.is_cpu:
            raise ValueError(f"a packed matrix of {self.shape[1]} inputs takes fp32 [M, {self.shape[1]}] on a CPU, not {x.dtype} "
                             f"{list(shape)} on {x.device}")  # fmt: skip
        x = x.contiguous()
        y = x.new_empty(shape[0], self.shape[0])
        self._library.product(self._at, x.data_ptr(), y.data_ptr(), shape[0], torch.get_num_threads())  # type: ignore[union-attr]
        return y

    def dequantize(self) -> Tensor:
        """W in fp32 [N, K], without the bias."""
        out = torch.empty(self.shape, dtype=torch.float32, device="cpu")
        self._library.unpacked(self._at, out.data_ptr(), 0, self.shape[0], torch.get_num_threads())  # type: ignore[union-attr]
        return out


def joined(parts: list[Quantized]) -> Quantized:
    """Matrices of one width and format as one, below each other."""
    scales = [part.scales for part in parts if part.scales is not None]
    return Quantized(parts[0].kind, torch.cat([part.codes for part in parts]), torch.cat(scales) if scales else None)
