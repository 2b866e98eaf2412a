"""Adapters as the package peft stores them: adapter_config.json and adapter_model.safetensors beside a model of their own place.

A layer's two matrices are base_model.model.NAME.lora_A.weight [r, K] and .lora_B.weight [N, r], NAME being the layer's in the
model that was adapted: transformers' for a model that it has, else ours. Where one layer of theirs is several of ours (GPT-2's
c_attn), reading cuts B by its rows; writing puts the A one below the other and the B on a diagonal, with the rank that this makes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treadle.checkpoint.layout import MANIFEST
from treadle.checkpoint.reader import Checkpoint
from treadle.checkpoint.tensors import parse_tensors
from treadle.errors import CheckpointError, ConfigError, InputError, ShapeError
from treadle.models.adapters import alpha_of, scale_of
from treadle.models.huggingface.config import written
from treadle.models.huggingface.reading import ForeignModel, ours_of, read_json
from treadle.models.huggingface.tables import Family, Weight
from treadle.models.settings import AdapterSettings
from treadle.models.transformer import TransformerConfig
from treadle.settings import shown
from treadle.text.base import META_FILE, Tokenizer

Tensors = dict[str, Tensor]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])(?:\.[^.]+)?\.weight")  # between them some versions write the adapter's name
# Keys of adapter_config.json that change what is computed, with the values that are computed here.
ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None), "lora_bias": (False, None),
    "modules_to_save": (None, []), "layer_replication": (None, []), "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}), "alora_invocation_tokens": (None, []), "use_qalora": (False, None),
    "use_bdlora": (False, None), "arrow_config": (None,), "use_monteclora": (False, None), "velora_config": (None,),
}  # fmt: skip
# Ways of starting that change the base's weights too, so that an adapter needs a base of its own.
OTHER_BASES = ("pissa", "olora", "corda", "loftq")


def is_peft(path: Path) -> bool:
    """A folder with an adapter of peft's."""
    return (path / CONFIG).is_file() and not (path / "config.toml").is_file()


@dataclass(frozen=True)
class Adapter:
    """One of our layers' adapter: W + scale B A."""

    a: Tensor
    b: Tensor
    scale: float


class PeftFolder(Checkpoint):
    """An adapter on its base, read like a checkpoint of the whole model: its weights are the base's with the adapter merged.
    InputError where the base is not there; ConfigError for what is not computed here."""

    def __init__(self, folder: Path, locate: Callable[[str], Checkpoint], weights: Callable[[Checkpoint], tuple[Tensors, Any]]) -> None:
        """locate: how the base is found by its name; weights: how its weights and its model without memory are read."""
        self.folder, self.step = folder, 0
        self.table = read_json(folder / CONFIG)
        _refuse_other_kinds(self.table, str(folder / CONFIG))
        if not (folder / WEIGHTS).is_file():
            raise InputError(f"{folder} holds no {WEIGHTS}; an adapter in a .bin file is a pickle, which treadle never reads: save it anew "
                             "with save_pretrained(FOLDER, safe_serialization=True)")  # fmt: skip
        self.bytes_of_adapter = (folder / WEIGHTS).read_bytes()
        self.digest = hashlib.sha256(self.bytes_of_adapter).hexdigest()
        self.base, self._weights = self._base(locate), weights
        self.manifest = {"step": 0, "weights_only": True, "files": {WEIGHTS: {"sha256": self.digest, "base": str(self.base.folder)}}}

    def _base(self, locate: Callable[[str], Checkpoint]) -> Checkpoint:
        name = self.table.get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            raise InputError(f"{self.folder / CONFIG} names no base model; write where it is there: \"base_model_name_or_path\": \"FOLDER\"")
        beside = self.folder / name
        try:
            return locate(str(beside) if beside.exists() else name)
        except InputError as problem:
            raise InputError(f"the model that {self.folder} adapts is not there ({problem}); put it there, or say where it is under "
                             f"base_model_name_or_path in {self.folder / CONFIG}") from None  # fmt: skip

    def text(self, member: str) -> str:
        """The base's."""
        return self.base.text(member)

    def raw(self, member: str) -> bytes:
        return self.base.raw(member)

    def members(self, prefix: str = "") -> list[str]:
        """Those of the base's tokenizer."""
        return self.base.members(prefix) if prefix == "tokenizer/" else []

    def own_tokenizer(self) -> Tokenizer | None:
        """The tokenizer in this folder, where there is one. One that peft's users saved puts before a prompt what the model expects
        there, as a model of transformers' does; rows of our own training begin without it."""
        names = [path.name for path in self.folder.iterdir()]
        if not any(name in ("tokenizer.json", META_FILE) or name.endswith(".model") for name in names):
            return None
        made = Tokenizer.load(self.folder)
        if isinstance(self.base, ForeignModel) and MANIFEST not in names:
            made.prompt_start = () if made.bos_id is None else (made.bos_id,)
        return made

    def verify(self) -> None:
        """There is no manifest to verify; names and shapes are checked when the weights are read."""

    @property
    def sharded(self) -> bool:
        return False

    @torch.no_grad()
    def tensors(self, stem: str) -> Tensors:
        """The base's weights by our names with the adapter added, in fp32. CheckpointError for any other stem than the
        weights'."""
        if stem != "model":
            raise CheckpointError(f"{self.folder} holds weights alone")
        whole, model = self._weights(self.base)
        for layer, adapter in self.adapters({name: tuple(tensor.shape) for name, tensor in whole.items()}, model.config).items():
            weight = whole[f"{layer}.weight"]
            whole[f"{layer}.weight"] = (weight.double() + adapter.scale * (adapter.b.double() @ adapter.a.double())).float()
        return whole

    def adapters(self, shapes: Mapping[str, tuple[int, ...]], shape: Any) -> dict[str, Adapter]:
        """Our layer -> its adapter in fp32. shapes: of the base's weights. ShapeError names what does not fit."""
        family = self.base.family if isinstance(self.base, ForeignModel) else family_for(shape)
        pairs: dict[str, dict[str, Tensor]] = {}
        for name, tensor in parse_tensors(np.frombuffer(self.bytes_of_adapter, dtype=np.uint8), str(self.folder / WEIGHTS)).items():
            found = KEY.fullmatch(name.removeprefix(PREFIX))
            if found is None and name.endswith(".base_layer.weight"):
                continue  # the head's own weight, which peft writes beside its adapter: the base has it
            if found is None:
                raise ShapeError(f"{self.folder / WEIGHTS} has a tensor {name}, which is no part of a linear layer's adapter; merge it "
                                 "with peft (merge_and_unload) and read the whole model")  # fmt: skip
            pairs.setdefault(found["layer"], {})[found["part"]] = tensor.float()
        made: dict[str, Adapter] = {}
        for layer, pair in pairs.items():
            if pair.keys() != {"A", "B"}:
                raise ShapeError(f"{self.folder / WEIGHTS} has one matrix of {layer} alone")
            a, b = pair["A"], pair["B"]
            ours = self._ours(layer, family, shapes)
            sizes = [shapes[f"{one}.weight"] for one in ours]
            if a.dim() != 2 or b.dim() != 2 or (b.shape[0], a.shape[1]) != (sum(s[0] for s in sizes), sizes[0][1]) or a.shape[0] != b.shape[1]:
                raise ShapeError(f"{self.folder}: the adapter of {layer} is {list(a.shape)} and {list(b.shape)}, and the layer of "
                                 f"{self.base.folder} is {[sum(s[0] for s in sizes), sizes[0][1]]}: it belongs to another model")  # fmt: skip
            for one, rows in zip(ours, b.split([s[0] for s in sizes])):
                made[one] = Adapter(a, rows, self._scale(layer, a.shape[0]))
        if not made:
            raise ShapeError(f"{self.folder / WEIGHTS} holds no adapter")
        return made

    def _ours(self, layer: str, family: Family | None, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        if family is not None:
            for name in (layer, family.prefix + layer):
                found = ours_of(family, f"{name}.weight")
                if found is not None and all(one in shapes and len(shapes[one]) == 2 for one in found[0]):
                    return [one.removesuffix(".weight") for one in found[0]]
        if len(shapes.get(f"{layer}.weight", ())) == 2:
            return [layer]
        if layer.rpartition(".")[2] == "lm_head":
            raise ConfigError(f"{self.folder} adapts the head, which {self.base.folder} shares with its embedding; an adapter that is one "
                              "matrix cannot change one and leave the other. Merge it with peft: merge_and_unload()")  # fmt: skip
        raise ShapeError(f"{self.folder} adapts a layer {layer}, which {self.base.folder} does not have")

    def _scale(self, layer: str, rank: int) -> float:
        """Of a layer of theirs; patterns of names may give it an alpha of its own (its rank is its matrices')."""
        alpha = _by_pattern(self.table.get("alpha_pattern"), layer, self.table.get("lora_alpha", 8))
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ConfigError(f"{self.folder / CONFIG}: lora_alpha = {shown(alpha)}: give a number")
        return scale_of(float(alpha), rank, bool(self.table.get("use_rslora")))


def _refuse_other_kinds(table: Mapping[str, Any], place: str) -> None:
    for key, values in ONLY.items():
        if key in table and table[key] not in values:
            raise ConfigError(f"{place}: {key} = {shown(table[key])} is not computed here; a LoRA of linear layers is. Merge it with "
                              "peft (merge_and_unload) and read the whole model")  # fmt: skip
    start = table.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(OTHER_BASES):
        raise ConfigError(f"{place}: init_lora_weights = {shown(start)} changes the base's weights as well; merge it with peft "
                          "(merge_and_unload) and read the whole model")  # fmt: skip


def _by_pattern(patterns: Any, layer: str, default: Any) -> Any:
    """The value of the first pattern that the layer's name ends with."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.match(rf"(.*\.)?({str(pattern).removeprefix('^')})$", layer):
                return value
        except re.error:
            raise ConfigError(f"alpha_pattern: {shown(pattern)} is no pattern") from None
    return default


def family_for(shape: Any) -> Family | None:
    """The family as which transformers would read a model of this configuration."""
    if not isinstance(shape, TransformerConfig):
        return None
    try:
        return written(shape)[0]
    except ConfigError:
        return None


# ---- writing ----


@torch.no_grad()
def for_peft(
    shape: Any, trained: Mapping[str, Tensor], settings: AdapterSettings, base: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(table of adapter_config.json, tensors by peft's names) of a run's adapters. shape: the model's configuration; base: what
    peft is told to load. The numbers are those of the run, in fp32; where a layer of theirs is several of ours, B holds zeros.
    lora_A [r, K], lora_B [N, r]."""
    family, rank = family_for(shape), settings.lora_rank
    assert rank is not None
    alpha = alpha_of(settings)
    ours = {name.removesuffix(".lora_A"): (trained[name], trained[name.removesuffix("A") + "B"]) for name in trained if name.endswith(".lora_A")}
    layers = _of_theirs(family, shape, list(ours))
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for theirs, (parts, sizes) in layers.items():
        pairs = [ours[one] for one in parts if one in ours]
        a = torch.cat([a for a, _ in pairs])
        b = torch.zeros(sum(sizes), len(a)) if len(parts) > 1 else pairs[0][1]
        row = column = 0
        for one, size in zip(parts, sizes) if len(parts) > 1 else ():
            if one in ours:
                b[row : row + size, column : column + rank] = ours[one][1]
                column += rank
            row += size
        if len(a) != rank:
            ranks[theirs] = len(a)
        tensors[f"{PREFIX}{theirs}.lora_A.weight"] = a.float().contiguous()
        tensors[f"{PREFIX}{theirs}.lora_B.weight"] = b.float().contiguous()
    # A product of another rank keeps its scale by an alpha of its own.
    alphas = {name: alpha * (found / rank) ** (0.5 if settings.use_rslora else 1.0) for name, found in ranks.items()}
    table = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM" if family is not None else None, "base_model_name_or_path": base, "revision": None,
        "r": rank, "lora_alpha": alpha, "lora_dropout": settings.lora_dropout, "use_rslora": settings.use_rslora,
        "target_modules": _targets(list(layers), family, shape), "bias": "none", "use_dora": False, "init_lora_weights": True,
        "fan_in_fan_out": family is not None and any(weight.transposed for weight in family.layer), "inference_mode": True,
        "modules_to_save": None, "rank_pattern": ranks, "alpha_pattern": alphas,
    }  # fmt: skip
    return table, tensors


def _of_theirs(family: Family | None, shape: Any, ours: list[str]) -> dict[str, tuple[list[str], list[int]]]:
    """Their layer -> (the layers of ours in it, the outputs of each), for those that hold an adapted one."""
    if family is None:
        return {name: ([name], [0]) for name in ours}
    from treadle.models.transformer import Transformer

    with torch.device("meta"):
        sizes = {name: tensor.shape[0] for name, tensor in Transformer(shape).named_weights().items()}
    found: dict[str, tuple[list[str], list[int]]] = {}
    for theirs, ours_there in _modules(family, shape):
        if any(one in ours for one in ours_there):
            found[theirs] = (ours_there, [sizes[f"{one}.weight"] for one in ours_there])
    lost = set(ours) - {one for parts, _ in found.values() for one in parts}
    if lost:
        raise ConfigError(f"peft has no name for the layer {min(lost)} of a {family.model_type} model")
    return found


def _modules(family: Family, shape: Any) -> list[tuple[str, list[str]]]:
    """(their module, the modules of ours in it), layer by layer."""

    def row(theirs: str, ours: str, weight: Weight) -> tuple[str, list[str]]:
        return f"{theirs}{weight.theirs}", [f"{ours}{one}" for one in weight.ours]

    return [row(f"{family.layers}{i}.", f"layers.{i}.", weight) for i in range(shape.num_layers) for weight in family.layer]


def _targets(theirs: list[str], family: Family | None, shape: Any) -> list[str]:
    """The shortest ends of names that mean these layers and no others."""
    every = [name for name, _ in _modules(family, shape)] if family is not None else theirs
    found: set[str] = set()
    for name in theirs:
        parts = name.split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        found.add(next((end for end in ends if all(one in theirs for one in every if one == end or one.endswith(f".{end}"))), name))
    return sorted(found)


def files_of(table: Mapping[str, Any]) -> dict[str, bytes]:
    """adapter_config.json."""
    return {CONFIG: (json.dumps(table, indent=1) + "\n").encode()}
