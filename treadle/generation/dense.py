"""Decoding of dense transformers by one compiled call a step (ops/dense_step.py), and their prompts in large chunks.

What a model has to be for it is read off its modules; whether the two ways agree is then tried on a few tokens, so that a
kind of model that this file does not know takes the ordinary way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.generation.decoding import DecodableModel, Decoding, advance, rewind
from treadle.layers.attention import Attention
from treadle.layers.mlp import SwiGLU
from treadle.layers.norm import RMSNorm
from treadle.layers.quantized_linear import multiplies_bf16
from treadle.ops.dense_step import LANES, Caches, DenseLayer, DenseStep
from treadle.ops.packed_linear import PackedMatrix, Quantized, joined, native
from treadle.ops.rms_norm import rms_norm_reference

CHUNK = 1024  # tokens of a prompt that go through the blocks together
FEW = 64  # tokens of a row that the compiled step takes one by one; more are faster as products of matrices
QUERIES = 128  # that attention computes together
TRIED = 5  # tokens on which both ways have to agree
OF_BLOCK = {"attention_norm", "attention", "attention_post_norm", "mlp_norm", "mlp", "mlp_post_norm", "dropout", "dynamics"}
OF_MODEL = {"embedding", "layers", "norm", "head", "dropout", "positions"}


class DenseForm:
    """A model's weights as the compiled step takes them."""

    def __init__(self, model: Any, layers: dict[str, Quantized]) -> None:
        """layers: each linear layer's matrix, by module name."""
        first: Attention = model.layers[0].attention
        self.heads, self.groups, self.head_width = first.heads, first.groups, first.head_width
        self.eps, self.scale = model.norm.eps, (first.query_factor or 1.0) * first.head_width**-0.5
        self.made = [self._layer(block, f"layers.{number}", layers) for number, block in enumerate(model.layers)]
        self.head = PackedMatrix(layers["head"], model.head.bias)
        self.step = DenseStep(
            self.made, self.head, model.embedding.weight, model.norm.weight, heads=self.heads, groups=self.groups,
            head_width=self.head_width, eps=self.eps, scale=self.scale,
        )  # fmt: skip

    @staticmethod
    def _layer(block: Any, name: str, layers: dict[str, Quantized]) -> DenseLayer:
        attention, mlp = block.attention, block.mlp

        def packed(module: Any, at: str, *parts: str) -> PackedMatrix:
            biases = [getattr(module, part).bias for part in parts]
            bias = torch.cat([b.detach().float() for b in biases]) if biases[0] is not None else None
            return PackedMatrix(joined([layers[f"{name}.{at}.{part}"] for part in parts]), bias)

        query_norm, key_norm = (None if n is None else n.weight for n in (attention.query_norm, attention.key_norm))
        return DenseLayer(
            packed(attention, "attention", "query", "key", "value"), packed(attention, "attention", "out"),
            packed(mlp, "mlp", "gate", "up"), packed(mlp, "mlp", "down"),
            block.attention_norm.weight.detach(), block.mlp_norm.weight.detach(), query_norm, key_norm,
        )  # fmt: skip


def is_dense(model: Any) -> bool:
    """Whether a model's modules are those that the compiled step computes, on a CPU, in fp32."""
    parts = all(hasattr(model, name) for name in OF_MODEL) and hasattr(getattr(model, "config", None), "rope_scaling")
    if native() is None or not parts or model.device.type != "cpu" or model.dtype != torch.float32:
        return False
    config = model.config
    plain = (
        {name for name, _ in model.named_children()} <= OF_MODEL
        and model.positions is None and config.embedding_multiplier == 1 and model.logit_softcap is None
        and config.dynamics == "none" and type(model.norm) is RMSNorm and config.hidden_size % LANES == 0
        and (config.rope_scaling is None or config.rope_scaling["rope_type"] != "dynamic")
    )  # fmt: skip
    return plain and all(_is_dense_block(block, model.norm.eps) for block in model.layers)


def _is_dense_block(block: Any, eps: float) -> bool:
    if not {name for name, _ in block.named_children()} <= OF_BLOCK or type(block.attention) is not Attention or type(block.mlp) is not SwiGLU:
        return False
    attention, mlp = block.attention, block.mlp
    norms = [block.attention_norm, block.mlp_norm, *(n for n in (attention.query_norm, attention.key_norm) if n is not None)]
    inner = mlp.down.in_features
    linears = {attention.query, attention.key, attention.value, attention.out, mlp.gate, mlp.up, mlp.down}
    return (
        not block.norms_sums and block.dynamics is None and mlp.activation is F.silu
        and type(block.attention_post_norm) is nn.Identity and type(block.mlp_post_norm) is nn.Identity
        and attention.sliding_window is None and attention.softcap is None and not attention.whole_norm
        and all(type(norm) is RMSNorm and norm.eps == eps for norm in norms)
        and attention.head_width % LANES == 0 and inner % LANES == 0
        and all(isinstance(layer, nn.Linear) for layer in linears)
        and sum(p.numel() for p in block.parameters()) == sum(p.numel() for m in (*linears, *norms) for p in m.parameters())
    )  # fmt: skip


class DenseDecoding(Decoding):
    """Prompts row by row, without padding; then a step of all rows, or several tokens of one, in one compiled call."""

    def __init__(self, model: Any, form: DenseForm, rows: int, max_len: int) -> None:
        self.form, self.embedding = form, model.embedding.weight
        super().__init__(model, rows, max_len)
        self.keys = Caches([layer.keys for layer in self.state.layers])
        self.values = Caches([layer.values for layer in self.state.layers])
        places = torch.zeros(1, max_len, dtype=torch.int64)
        cosines, sines = model.context(Batch.from_ids(places), None).rotary
        self.angles = (cosines[0, 0], sines[0, 0])
        self.rows, self.max_len = torch.arange(rows), max_len

    def prompt(self, batch: Batch) -> Tensor:
        ids, mask = batch.input_ids, batch.token_mask
        self._room(ids.shape[1] if batch.doc_ids is None else int(mask.sum(1).max()))
        last, counts = [], []
        for row in range(ids.shape[0]):
            own = ids[row] if batch.doc_ids is None else ids[row, mask[row]]
            counts.append(own.shape[0])
            last.append(self._row(row, own))
        advance(self.state, mask, counts)
        return self.form.head.product(torch.cat(last))

    def step(self, ids: Tensor, running: Tensor | None = None) -> Tensor:
        self._room(1)
        positions = self.state.lengths
        if running is None or running.shape[0] == ids.shape[0]:
            logits = self._call(ids, self.rows, positions)
        else:
            logits = torch.zeros(ids.shape[0], self.form.step.vocabulary)
            logits[running] = self._call(ids[running], running, positions[running])
        self.state.lengths = positions + 1
        self.state.host_lengths = [length + 1 for length in self.state.host_lengths]
        return logits

    def _several(self, ids: Tensor) -> Tensor:
        count = ids.shape[0]
        self._room(count)
        logits = self._call(ids, self.rows[:1].expand(count), self.state.lengths + torch.arange(count))
        rewind(self.state, -count)
        return logits

    def _call(self, ids: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        self.form.step.use(*self.angles)
        _, logits = self.form.step(self.keys, self.values, ids.contiguous(), rows.contiguous(), positions.contiguous())
        assert logits is not None
        return logits

    def _room(self, count: int) -> None:
        longest = self.state.used + count
        if longest > self.max_len:
            raise ConfigError(f"the state holds {self.max_len} tokens per row, {longest} are needed")

    def _row(self, row: int, ids: Tensor) -> Tensor:
        """Tokens ids [T] of one row -> hidden [1, D] of the last after the final norm; their keys and values are kept."""
        start = self.state.host_lengths[row]
        hidden = torch.zeros(1, self.form.step.width)
        if not ids.shape[0]:
            return hidden
        if ids.shape[0] <= FEW:
            self.form.step.use(*self.angles)
            rows = torch.full_like(ids, row)
            return self.form.step(self.keys, self.values, ids.contiguous(), rows, torch.arange(start, start + ids.shape[0]), False)[0][-1:]
        for part in ids.split(CHUNK):
            hidden = self._chunk(row, part, start)
            start += part.shape[0]
        return rms_norm_reference(hidden[-1:], self.form.step.norm, self.form.eps)

    def _chunk(self, row: int, ids: Tensor, start: int) -> Tensor:
        form, count, end = self.form, ids.shape[0], start + ids.shape[0]
        cosines, sines = (t[start:end] for t in self.angles)
        heads, groups, width = form.heads, form.groups, form.head_width
        x = self.embedding[ids].float()
        for number, layer in enumerate(form.made):
            made = product_of_many(layer.qkv, rms_norm_reference(x, layer.attention_norm, form.eps)).view(count, -1, width)
            q, k, v = (t.transpose(0, 1) for t in made.split([heads, groups, groups], 1))
            if layer.query_norm is not None and layer.key_norm is not None:
                q, k = rms_norm_reference(q, layer.query_norm, form.eps), rms_norm_reference(k, layer.key_norm, form.eps)
            q = turned(q, cosines, sines)
            keys, values = self.keys.tensors[number][row], self.values.tensors[number][row]
            keys[:, start:end], values[:, start:end] = turned(k, cosines, sines), v
            y = attended(q, keys[:, :end], values[:, :end], start, form.scale, layer.qkv.kind != "fp32" and multiplies_bf16())
            x = x + product_of_many(layer.out, y.transpose(0, 1).reshape(count, heads * width))
            gate, up = product_of_many(layer.gate_up, rms_norm_reference(x, layer.mlp_norm, form.eps)).chunk(2, -1)
            x = x + product_of_many(layer.down, F.silu(gate) * up)
        return x


def product_of_many(matrix: PackedMatrix, x: Tensor) -> Tensor:
    """x fp32 [T, K] -> fp32 [T, N]: in bf16 where the weights are rounded anyway and the machine is faster so."""
    if matrix.kind == "fp32" or not multiplies_bf16():
        return matrix.product(x)
    y = (x.to(torch.bfloat16) @ matrix.dequantize().to(torch.bfloat16).t()).float()
    return y if matrix.bias is None else y + matrix.bias


def turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x [H, T, E] turned by its positions' angles [T, turned / 2]; other dimensions stay as they are."""
    half = cosines.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines, rest), -1)


def attended(q: Tensor, keys: Tensor, values: Tensor, start: int, scale: float, in_bf16: bool) -> Tensor:
    """q [H, T, E] of positions start.. over keys and values [G, start + T, E] -> [H, T, E], by blocks of queries."""
    count, repeat = q.shape[1], q.shape[0] // keys.shape[0]
    if repeat > 1:
        keys, values = keys.repeat_interleave(repeat, 0), values.repeat_interleave(repeat, 0)
    if in_bf16:
        q, keys, values = q.to(torch.bfloat16), keys.to(torch.bfloat16), values.to(torch.bfloat16)
    out = torch.empty_like(q)
    hidden_keys = torch.ones(min(QUERIES, count), min(QUERIES, count), dtype=torch.bool).triu_(1)
    for first in range(0, count, QUERIES):
        last = min(first + QUERIES, count)
        scores = torch.bmm(q[:, first:last] * scale, keys[:, : start + last].transpose(1, 2))
        scores[:, :, start + first :].masked_fill_(hidden_keys[: last - first, : last - first], float("-inf"))
        out[:, first:last] = torch.bmm(scores.softmax(-1), values[:, : start + last])
    return out.float()


def agrees(model: DecodableModel, form: DenseForm, reference: DecodableModel) -> bool:
    """Whether the compiled step gives what the modules give, on TRIED tokens."""
    ids = torch.arange(TRIED) * 7 % model.vocab_size
    found = DenseDecoding(model, form, 1, TRIED)
    logits = found.several(ids)
    expected = Decoding(reference, 1, TRIED).several(ids)
    return bool((logits - expected).abs().max() <= 1e-3 * expected.abs().max().clamp_min(1e-3))
