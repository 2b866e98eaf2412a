"""A model made ready for reading: its weights in fewer bits, laid out for decoding, once and kept while they do not change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from treadle.errors import ConfigError
from treadle.generation.decoding import DecodableModel, Decoding
from treadle.generation.dense import DenseDecoding, DenseForm, agrees, has_dense_parts, is_dense
from treadle.generation.marks import form_of, values_of
from treadle.generation.mode import evaluating
from treadle.layers.quantized_linear import quantizable, quantized_layers, with_own_tensors, with_quantized
from treadle.ops.packed_linear import FORMATS, Quantized, native, stored_bytes

LARGEST_COPY = 1 << 31  # bytes of fp32 weights that are laid out anew for decoding; beyond, the ordinary way reads them in place
HEAD = "head"  # takes 8 bits where the rest takes 4: its share of the loss is larger than its share of the bytes
_kept: WeakKeyDictionary[Any, tuple[Any, dict[str, _Made]]] = WeakKeyDictionary()
_stored: WeakKeyDictionary[Any, tuple[Any, str, dict[str, Quantized]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Made:
    """What is laid out for a model: its compiled form, or a copy that reads other matrices. Not the model itself, so that what is
    kept here does not keep it alive."""

    form: DenseForm | None = None
    copy: DecodableModel | None = None

    @classmethod
    def of(cls, model: Any, weights: str, layers: dict[str, Quantized]) -> _Made:
        if is_dense(model) and quantizable(model, []).keys() == layers.keys() and DenseForm.takes(model, layers):
            form = DenseForm(model, layers)
            reference = model if weights == "fp32" else with_quantized(model, layers, packed=False)
            if agrees(model, form, reference):
                return cls(form)
        return cls(copy=with_quantized(model, layers) if weights != "fp32" else None)


class Reading:
    """What generation reads: a model with its weights in a format, and the compiled step where there is one."""

    def __init__(self, model: Any, weights: str, layers: dict[str, Quantized] | None = None, made: _Made | None = None) -> None:
        """layers: the matrices, where they are known already; made: what was laid out before."""
        if made is None:
            made = _Made.of(model, weights, quantized(model, weights) if layers is None else layers)
        self.weights, self.form = weights, made.form
        self.model: DecodableModel = model if made.copy is None else made.copy

    def start(self, rows: int, max_len: int, ordinary: bool = False) -> Decoding:
        """A generation of so many rows. ordinary: the model reads more than tokens."""
        if self.form is None or ordinary:
            return Decoding(self.model, rows, max_len)
        return DenseDecoding(self.model, self.form, rows, max_len)


def _is_too_large(model: Any) -> bool:
    return 4 * sum(p.numel() for p in model.parameters()) > LARGEST_COPY


def laid_out_bytes(model: Any, weights: str, kind: str) -> int:
    """Bytes that `reading` takes beside a model's own weights, at its fullest. model: it may be without memory; kind: "cpu" or "cuda"."""
    layers = quantizable(model, _spared(model))
    if weights == "fp32":
        form = kind == "cpu" and native() is not None and has_dense_parts(model) and DenseForm.takes(model, layers)
        if not form or _is_too_large(model):
            return 0
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    once = sum(stored_bytes(_kind(name, weights), shape) for name, shape in shapes.items())
    if kind != "cpu" or weights == "fp32":
        return once
    # As files hold them they stay beside: 8 and 4 bits while the model does (models/quantized.py), 16 while all are laid out. One matrix at
    # a time is in fp32 meanwhile. Peaks of gpt2 and small: .9 to 1.1 of the plan with these.
    return 2 * once + max((stored_bytes("fp32", shape) for shape in shapes.values()), default=0)


def checked(weights: str | None) -> str:
    """The format that is meant; ConfigError for one that there is not."""
    if weights is not None and weights not in FORMATS:
        raise ConfigError(f"weights = {weights!r}: use {', '.join(FORMATS)}")
    return weights or "fp32"


def quantized(model: Any, weights: str) -> dict[str, Quantized]:
    """A model's linear layers in a format, by name; those that have to stay in full precision are left out."""
    return quantized_layers(model, _spared(model), weights, {HEAD: _kind(HEAD, weights)})


def _spared(model: Any) -> list[Any]:
    return model.full_precision_modules() if hasattr(model, "full_precision_modules") else []


def _kind(name: str, weights: str) -> str:
    """The format of a layer of this name."""
    return "int8" if name == HEAD and weights == "int4" else weights


def remember(model: Any, layers: dict[str, Quantized], weights: str) -> None:
    """A model's weights were read from these, or are known in this format: nothing is quantised again while they stay."""
    _stored[model] = (values_of(model), weights, layers)


def remembered(model: Any) -> str | None:
    """The format in which a model's weights are known."""
    stored = _stored.get(model)
    return stored[1] if stored is not None and stored[0] == values_of(model) else None


def layers_of(model: Any, weights: str, values: Any = None) -> dict[str, Quantized]:
    """A model's linear layers in a format: as they are known, else quantised now. values: its `values_of`, where those are known."""
    stored = _stored.get(model)
    if stored is not None and stored[1] == weights and stored[0] == (values or values_of(model)):
        return stored[2]
    return quantized(model, weights)


@torch.no_grad()
def reading(model: Any, weights: str | None = None, keep: bool = True) -> Reading:
    """A model ready for reading, by default in the format of the file that it came from. What is laid out for it is kept for the next
    time while it is the same model (generation/marks.py says what is looked at). keep: not for a model in training, which will be
    another the next time."""
    values, stored = None, _stored.get(model)
    if weights is None and stored is not None:
        values = values_of(model)
        weights = stored[1] if stored[0] == values else None
    weights = checked(weights)
    if weights == "fp32" and (not is_dense(model) or _is_too_large(model)):
        return Reading(model, weights, {})
    if model.training or not keep:
        with evaluating(model):  # dropout would keep the two ways from agreeing, and stay on in a copy
            return Reading(model, weights)
    values = values or values_of(model)
    mark = form_of(model), values
    known = _kept.get(model)
    if known is None or known[0] != mark:
        known = _kept[model] = (mark, {})
    if weights not in known[1]:
        known[1][weights] = _Made.of(model, weights, layers_of(model, weights, values))
    return Reading(model, weights, made=known[1][weights])


@torch.no_grad()
def lasting(model: Any, weights: str | None = None) -> Reading:
    """As `reading`, for as long as it is used: what is laid out or in fewer bits stays what the model is now, so the rest of it (embeddings,
    norms) is copied to go with it. What is neither laid out nor in fewer bits is read in place, as the model then is."""
    ready = reading(model, weights)
    if ready.form is not None:
        own = with_own_tensors(model, quantizable(model, []).values())
        return Reading(own, ready.weights, made=_Made(ready.form.of(own)))
    return ready if ready.model is model else Reading(with_own_tensors(ready.model), ready.weights, made=_Made())  # type: ignore[type-var]


@torch.no_grad()
def in_format(model: Any, weights: str) -> Any:
    """A model like this one whose linear layers are read in a format, for evaluation."""
    weights = checked(weights)
    return model if weights == "fp32" else with_quantized(model, layers_of(model, weights))
