"""Decoding of dense transformers by one compiled call a step (ops/dense_step.py), and their prompts in large chunks.

What a model has to be for it is read off its modules; whether the two ways agree is then tried on a few tokens, so that a
kind of model that this file does not know takes the ordinary way.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.generation.decoding import DecodableModel, Decoding, advance, rewind
from treadle.generation.marks import is_hooked
from treadle.layers.attention import Attention
from treadle.layers.mlp import SwiGLU
from treadle.layers.norm import RMSNorm
from treadle.layers.quantized_linear import multiplies_bf16
from treadle.ops.dense_step import LANES, Caches, DenseLayer, DenseStep, prompt_attention
from treadle.ops.packed_linear import PackedMatrix, Quantized, joined, native
from treadle.ops.rms_norm import rms_norm_reference

CHUNK = 1024  # tokens of a prompt that go through the blocks together
STEP = 256  # the same where the compiled step takes them
FEW = 64  # tokens of a prompt from which on products in bf16 pay
TRIED = 5  # tokens on which both ways have to agree
AGREES, AGREES_ROUNDED = 1e-3, 5e-2  # of the largest logit; where products round their input to bf16, .003 to .018 were seen
OF_BLOCK = {"attention_norm", "attention", "attention_post_norm", "mlp_norm", "mlp", "mlp_post_norm", "dropout", "dynamics"}
OF_MODEL = {"embedding", "layers", "norm", "head", "dropout", "positions", "token_shift"}


class DenseForm:
    """A model's weights as the compiled step takes them."""

    def __init__(self, model: Any, layers: dict[str, Quantized]) -> None:
        """layers: each linear layer's matrix, by module name."""
        first: Attention = model.layers[0].attention
        self.heads, self.groups, self.head_width = first.heads, first.groups, first.head_width
        self.eps, self.scale = model.norm.eps, (first.query_factor or 1.0) * first.head_width**-0.5
        self.made = [self._layer(block, f"layers.{number}", layers) for number, block in enumerate(model.layers)]
        self.head = PackedMatrix(layers["head"], None if model.head.bias is None else model.head.bias.detach().clone())
        self.step, self.rounds = self._step(model), self.head.paired

    def of(self, model: Any) -> DenseForm:
        """The same matrices, with another model's embedding and norms."""
        new = copy.copy(self)
        new.made = [replace(layer, **_gains(block)) for layer, block in zip(self.made, model.layers)]
        new.step = new._step(model)
        return new

    def _step(self, model: Any) -> DenseStep:
        return DenseStep(
            self.made, self.head, model.embedding.weight, model.norm.weight, heads=self.heads, groups=self.groups,
            head_width=self.head_width, eps=self.eps, scale=self.scale,
        )  # fmt: skip

    @staticmethod
    def takes(model: Any, layers: Mapping[str, Any]) -> bool:
        """Whether each matrix is there: narrow ones are not packed (layers/quantized_linear.py), and then modules read them."""
        parts = ("attention.query", "attention.key", "attention.value", "attention.out", "mlp.gate", "mlp.up", "mlp.down")
        return {"head", *(f"layers.{number}.{part}" for number in range(len(model.layers)) for part in parts)} <= layers.keys()

    @staticmethod
    def _layer(block: Any, name: str, layers: dict[str, Quantized]) -> DenseLayer:
        attention, mlp = block.attention, block.mlp

        def packed(module: Any, at: str, *parts: str) -> PackedMatrix:
            biases = [getattr(module, part).bias for part in parts]
            bias = torch.cat([b.detach().float() for b in biases]) if biases[0] is not None else None
            return PackedMatrix(joined([layers[f"{name}.{at}.{part}"] for part in parts]), bias)

        return DenseLayer(
            packed(attention, "attention", "query", "key", "value"), packed(attention, "attention", "out"),
            packed(mlp, "mlp", "gate", "up"), packed(mlp, "mlp", "down"), **_gains(block),
        )  # fmt: skip


def _gains(block: Any) -> dict[str, Any]:
    """A block's norms, as DenseLayer calls them."""
    norms = {"attention_norm": block.attention_norm, "mlp_norm": block.mlp_norm,
             "query_norm": block.attention.query_norm, "key_norm": block.attention.key_norm}  # fmt: skip
    return {name: norm.weight.detach() for name, norm in norms.items() if norm is not None}


def is_dense(model: Any) -> bool:
    """Whether a model's modules are those that the compiled step computes, on a CPU, in fp32, and nobody listens to their calls."""
    return native() is not None and has_dense_parts(model) and model.device.type == "cpu" and model.dtype == torch.float32 and not is_hooked(model)


def has_dense_parts(model: Any) -> bool:
    """The same of a model that is only planned, wherever it is."""
    if not all(hasattr(model, name) for name in OF_MODEL) or not hasattr(getattr(model, "config", None), "rope_scaling"):
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
        self.token_shift = model.token_shift
        super().__init__(model, rows, max_len)
        self.state.layers = self.state.layers[: len(model.layers)]
        self.seen = torch.zeros(rows, max_len, dtype=torch.int64)  # the tokens, for a shift
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
            last.append(self._row(row, own, self.state.host_lengths[row], self.rounds_a_prompt_of(own.shape[0])))
        advance(self.state, mask, counts)
        return self.form.head.product(torch.cat(last))

    def step(self, ids: Tensor, running: Tensor | None = None) -> Tensor:
        self._room(1)
        positions = self.state.lengths
        if running is None or running.shape[0] == ids.shape[0]:
            logits = self._call(ids, self.rows, positions)
        else:
            logits = torch.zeros(ids.shape[0], self.form.step.vocabulary, dtype=torch.float32)
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

    def _shifted(self, ids: Tensor, rows: Tensor, positions: Tensor) -> Tensor | None:
        """What the first block reads of tokens [N] where each has a share of the one before it, [N, D]; else None."""
        if self.token_shift is None:
            return None
        self.seen[rows, positions] = ids
        before = self.embedding[self.seen[rows, (positions - 1).clamp_min(0)]]
        x: Tensor = self.token_shift.add(self.embedding[ids], before, positions)
        return x.float().contiguous()

    def _call(self, ids: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        x = self._shifted(ids, rows, positions)
        _, logits = self.form.step(self.angles, self.keys, self.values, ids.contiguous(), rows.contiguous(), positions.contiguous(), x=x)
        assert logits is not None
        return logits

    def _room(self, count: int) -> None:
        longest = self.state.used + count
        if longest > self.max_len:
            raise ConfigError(f"the state holds {self.max_len} tokens per row, {longest} are needed")

    def read(self, row: int, ids: Tensor, start: int, rounded: bool) -> Tensor:
        """Tokens ids [T] of one row from position `start` on -> logits [1, V] after the last. rounded: in products of bf16."""
        return self.form.head.product(self._row(row, ids, start, rounded))

    def tokens(self, ids: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Tokens ids [N] of some rows at their positions, whatever the other rows do -> logits [N, V] after each."""
        return self._call(ids, rows, positions)

    def rounds_a_prompt_of(self, count: int) -> bool:
        """Whether a prompt of so many tokens is read in products of bf16."""
        return count > FEW and rounds(self.form.made[0].qkv.kind)

    def _row(self, row: int, ids: Tensor, start: int, rounded: bool) -> Tensor:
        """Tokens ids [T] of one row -> hidden [1, D] of the last after the final norm; their keys and values are kept."""
        hidden = torch.zeros(1, self.form.step.width, dtype=torch.float32)
        if not ids.shape[0]:
            return hidden
        if not rounded:
            for part in ids.split(STEP):
                places = torch.arange(start, start + part.shape[0])
                rows = torch.full_like(part, row)
                x = self._shifted(part, rows, places)
                hidden, _ = self.form.step(self.angles, self.keys, self.values, part.contiguous(), rows, places, False, True, x)
                start += part.shape[0]
            return hidden
        for part in ids.split(CHUNK):
            hidden = self._chunk(row, part, start)
            start += part.shape[0]
        return rms_norm_reference(hidden, self.form.step.norm, self.form.eps)

    def _chunk(self, row: int, ids: Tensor, start: int) -> Tensor:
        """Some tokens [T] through all blocks, with products in bf16 -> the last one's [1, D]."""
        form, count, end = self.form, ids.shape[0], start + ids.shape[0]
        cosines, sines = (t[start:end, None] for t in self.angles)
        x = self._shifted(ids, torch.full_like(ids, row), torch.arange(start, end))
        x = self.embedding[ids].float() if x is None else x
        for number, layer in enumerate(form.made):
            made = product_in_bf16(layer.qkv, rms_norm_reference(x, layer.attention_norm, form.eps)).view(count, -1, form.head_width)
            q, k, v = made.split([form.heads, form.groups, form.groups], 1)
            if layer.query_norm is not None and layer.key_norm is not None:
                q, k = rms_norm_reference(q, layer.query_norm, form.eps), rms_norm_reference(k, layer.key_norm, form.eps)
            keys, values = self.keys.tensors[number][row], self.values.tensors[number][row]
            keys[:, start:end], values[:, start:end] = turned(k, cosines, sines).transpose(0, 1), v.transpose(0, 1)
            if layer is form.made[-1]:  # what follows the last keys and values matters for the last token alone
                x, q, cosines, sines, start = x[-1:], q[-1:], cosines[-1:], sines[-1:], end - 1
            x = x + product_in_bf16(layer.out, prompt_attention(turned(q, cosines, sines), keys, values, start, form.scale))
            gate, up = product_in_bf16(layer.gate_up, rms_norm_reference(x, layer.mlp_norm, form.eps)).chunk(2, -1)
            x = x + product_in_bf16(layer.down, F.silu(gate) * up)
        return x


def rounds(kind: str) -> bool:
    """Whether products of many rows take their factors in bf16: where the weights are rounded anyway, and the machine is faster
    so."""
    return kind != "fp32" and multiplies_bf16()


def product_in_bf16(matrix: PackedMatrix, x: Tensor) -> Tensor:
    """x fp32 [T, K] -> fp32 [T, N], both factors and the sums rounded to bf16."""
    y = (x.to(torch.bfloat16) @ matrix.dequantize().to(torch.bfloat16).t()).float()
    return y if matrix.bias is None else y + matrix.bias


def turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x [T, H, E] turned by its positions' angles [T, 1, turned / 2]; other dimensions stay as they are."""
    half = cosines.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines, rest), -1)


def agrees(model: DecodableModel, form: DenseForm, reference: DecodableModel) -> bool:
    """Whether the compiled step gives what the modules give, on TRIED tokens."""
    ids = torch.arange(TRIED) * 7 % model.vocab_size
    found = DenseDecoding(model, form, 1, TRIED)
    logits = found.several(ids)
    expected = Decoding(reference, 1, TRIED).several(ids)
    allowed = AGREES_ROUNDED if form.rounds else AGREES
    return bool((logits - expected).abs().max() <= allowed * expected.abs().max().clamp_min(1e-3))
