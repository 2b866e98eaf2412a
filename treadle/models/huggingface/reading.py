"""Models from elsewhere: a folder of transformers or a .gguf file, read tensor by tensor.

Loading needs the memory of the model's own weights and CHUNK_BYTES beside them: each tensor is read in runs of rows, straight
to where they belong. Nothing in a folder is executed and nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from treadle.checkpoint.reader import Checkpoint
from treadle.checkpoint.tensors import TensorPlace, tensor_places
from treadle.errors import CheckpointError, ConfigError, InputError, ShapeError
from treadle.models.base import CONFIG_FILE, WEIGHTS_FILE, Model
from treadle.models.catalogue import MODELS
from treadle.models.huggingface.config import family_of, keys_of
from treadle.models.huggingface.tables import CONSTANTS, Family, Weight
from treadle.models.transformer import Transformer, TransformerConfig
from treadle.settings import dump_toml
from treadle.text.base import Tokenizer, read_table

INDEX_FILE = "model.safetensors.index.json"
CHUNK_BYTES = 2 << 20  # measured with a model of 112 MB: 1.04 times its weights at the peak; 8 MB: 1.15
LARGEST_JSON = 64 << 20
OWN_KEYS, PREFIX = "treadle", "model."  # in config.json, and before our names of weights: of exports with a modeling file
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Stored(Protocol):
    """A tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As the file has it."""

    def rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last) of it, or these numbers of a vector."""


class ForeignModel(Checkpoint):
    """A model that treadle did not write, read like a checkpoint of weights alone. Subclasses say what its configuration and
    its tensors are."""

    cls: type[Model] = Transformer
    config: Any  # of cls
    family: Family | None

    def __init__(self, path: Path, table: dict[str, Any]) -> None:
        self.folder, self.step = path, 0
        self.manifest = {"step": 0, "files": {}, "weights_only": True}
        self.table = table
        try:
            self._understand()
        except ConfigError as problem:
            raise ConfigError(f"{problem}" if self.place in f"{problem}" else f"{self.place}: {problem}") from None

    def _understand(self) -> None:
        """Sets `family`, `cls` and `config`; ConfigError for what is not computed."""
        self.family = family_of(self.table, self.place)
        self.config = TransformerConfig(**keys_of(self.table, self.place))

    @property
    def place(self) -> str:
        """What messages call its configuration."""
        return str(self.folder)

    def stored(self) -> Mapping[str, Stored]:
        """Its tensors, by the names that transformers gives them."""
        raise NotImplementedError

    def own_tokenizer(self) -> Tokenizer:
        """InputError says where to put one."""
        raise NotImplementedError

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, which puts before a prompt what the model expects there."""
        made = self.own_tokenizer()
        made.prompt_start = () if made.bos_id is None else (made.bos_id,)
        return made

    def text(self, member: str) -> str:
        """The one text member of a checkpoint that this has: its model as config.toml says it."""
        if member != "config.toml":
            raise CheckpointError(f"{self.folder} was not written by treadle and has no {member}")
        keys = {key: value for key, value in self.config.model_dump().items() if value is not None}
        return dump_toml({"model": {"arch": self.cls.arch, **keys}})

    def raw(self, member: str) -> bytes:
        return self.text(member).encode()

    def verify(self) -> None:
        """There is no manifest to verify; shapes are checked when the weights are read."""

    @property
    def sharded(self) -> bool:
        return False

    @property
    def nbytes(self) -> int:
        """Of its files' weights."""
        raise NotImplementedError

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """All weights by our names, in fp32. Of any shapes; CheckpointError for any other stem than the weights'."""
        if stem != "model":
            raise CheckpointError(f"{self.folder} holds weights alone")
        with torch.device("meta"):
            shapes = self.cls(self.config).named_weights()
        weights = {name: torch.empty(tensor.shape) for name, tensor in shapes.items()}
        self._fill(weights)
        return weights

    def load_into(self, model: Model) -> None:
        """Copies the weights into a model of `self.config`; ShapeError names what is missing, surplus or of another shape."""
        self._fill(model.named_weights())

    def _fill(self, weights: dict[str, Tensor]) -> None:
        stored, found = self.stored(), set()
        with torch.no_grad():
            for name, (targets, weight) in self._plan(stored, weights).items():
                found |= set(targets)
                copy(stored[name], [weights[target] for target in targets], weight)
        if missing := sorted(weights.keys() - found):
            raise ShapeError(f"{self.folder} lacks the weights of {', '.join(missing[:4])}, which {self.place} describes; the files "
                             "are of another model, or some are missing")  # fmt: skip

    def _plan(self, stored: Mapping[str, Stored], weights: Mapping[str, Tensor]) -> dict[str, tuple[list[str], Weight]]:
        """Their tensor -> (ours that it holds, how), checked before anything is read."""
        assert self.family is not None
        prefixed = any(name.startswith(self.family.prefix) for name in stored)
        plan = {}
        for name in stored:
            whole = name if prefixed or name.startswith("lm_head.") else self.family.prefix + name
            if whole.endswith(CONSTANTS):
                continue
            found = ours_of(self.family, whole)
            if found is None or (missing := [one for one in found[0] if one not in weights]) == ["head.weight"]:
                if found is not None and self.config.tie_embeddings:  # written beside the embedding it equals
                    continue
                raise ShapeError(f"{self.folder} has a tensor {name}, which a {self.family.model_type} model does not")
            if missing:
                raise ShapeError(f"{self.folder} has a tensor {name}, and its configuration describes a model without it")
            _check(name, stored[name].shape, [tuple(weights[one].shape) for one in found[0]], found[1], self.folder)
            plan[name] = found
        return plan


def ours_of(family: Family, name: str) -> tuple[list[str], Weight] | None:
    """Names of our parameters that one of their tensors holds; None for a tensor that the table does not know."""
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    for weight in family.weights:
        if weight.theirs == stem:
            return [f"{ours}.{kind}" for ours in weight.ours], weight
    if stem.startswith(family.layers):
        number, _, inner = stem.removeprefix(family.layers).partition(".")
        for weight in family.layer:
            if weight.theirs == inner and number.isdecimal():
                return [f"layers.{int(number)}.{ours}.{kind}" for ours in weight.ours], weight
    return None


def _check(name: str, shape: tuple[int, ...], targets: list[tuple[int, ...]], weight: Weight, folder: Path) -> None:
    wanted = (sum(target[0] for target in targets), *targets[0][1:])
    wanted = wanted[::-1] if weight.transposed else wanted
    if tuple(shape) != wanted:
        raise ShapeError(f"{folder}: {name} is {list(shape)}, and its configuration asks for {list(wanted)}")


def copy(source: Stored, targets: list[Tensor], weight: Weight) -> None:
    """One of their tensors into ours, a few rows at a time. Of one shape, [N, K] or [N]."""
    width = max(1, int(torch.Size(source.shape[1:]).numel()))
    step = max(1, CHUNK_BYTES // (4 * width))
    turned = weight.transposed and len(source.shape) == 2
    for first in range(0, source.shape[0], step):
        last = min(first + step, source.shape[0])
        part = source.rows(first, last)
        if weight.offset:
            part = part.float() + weight.offset
        begin = 0
        for target in targets:
            end = begin + target.shape[0]
            if turned:
                target[:, first:last] = part[:, begin:end].t()
            elif begin < last and first < end:
                low, high = max(first, begin), min(last, end)
                target[low - begin : high - begin] = part[low - first : high - first]
            begin = end


# ---- folders ----


def is_foreign(path: Path) -> bool:
    """A .gguf file, or a folder with a config.json that is no model, checkpoint or run of treadle's own."""
    if path.suffix.lower() == ".gguf":
        return path.is_file()
    if not (path / CONFIG_FILE).is_file() or (path / "config.toml").is_file():
        return False
    kind = str(read_json(path / CONFIG_FILE).get("model_type"))
    return kind not in MODELS.names() and ":" not in kind


def read_json(path: Path) -> dict[str, Any]:
    """InputError unless it is a JSON table of a sensible size."""
    return read_table(path, LARGEST_JSON)


class TransformersFolder(ForeignModel):
    """A folder that transformers wrote: config.json, model.safetensors or its shards, tokenizer files. table: its config.json, where that
    has been read."""

    def __init__(self, folder: Path, table: dict[str, Any] | None = None) -> None:
        super().__init__(folder, read_json(folder / CONFIG_FILE) if table is None else table)

    @property
    def place(self) -> str:
        return str(self.folder / CONFIG_FILE)

    def _files(self) -> Iterator[Path]:
        if (self.folder / INDEX_FILE).is_file():
            named = read_json(self.folder / INDEX_FILE).get("weight_map")
            names = sorted(set(map(str, named.values()))) if isinstance(named, dict) else []
            for name in names:
                if Path(name).name != name or not name.endswith(".safetensors"):
                    raise CheckpointError(f"{self.folder / INDEX_FILE} names {name!r}, which is no file of this folder")
                yield self.folder / name
        elif (self.folder / WEIGHTS_FILE).is_file():
            yield self.folder / WEIGHTS_FILE
        else:
            pickled = [path.name for pattern in PICKLES for path in sorted(self.folder.glob(pattern))]
            if pickled:
                raise InputError(f"{self.folder} holds pickled weights ({pickled[0]}), which treadle never reads; write them anew "
                                 "with transformers, where you trust them: AutoModelForCausalLM.from_pretrained(FOLDER)"
                                 ".save_pretrained(OTHER)")  # fmt: skip
            raise InputError(f"{self.folder} holds no {WEIGHTS_FILE} and no {INDEX_FILE}")

    def stored(self) -> Mapping[str, TensorPlace]:
        """Tensors by transformers' names, unread; InputError for a shard that is missing, CheckpointError for a name that
        two have."""
        found: dict[str, TensorPlace] = {}
        for path in self._files():
            if not path.is_file():
                raise InputError(f"{path} is missing; {INDEX_FILE} names it")
            places = tensor_places(path)
            if twice := found.keys() & places.keys():
                raise CheckpointError(f"{path} and another file both hold {min(twice)}")
            found.update(places)
        return found

    @property
    def nbytes(self) -> int:
        return sum(place.nbytes for place in self.stored().values())

    def own_tokenizer(self) -> Tokenizer:
        try:
            return Tokenizer.load(self.folder)
        except InputError as problem:
            raise InputError(f"{problem}; copy the tokenizer's files (tokenizer.json, tokenizer_config.json) there") from None


class WithCode(TransformersFolder):
    """A folder that an export wrote for transformers with a modeling file. Its keys are treadle's own, and so is what computes it here:
    the file is never read, let alone run."""

    def _understand(self) -> None:
        keys = dict(self.table[OWN_KEYS])
        self.family, self.cls = None, MODELS.get(str(keys.pop("arch", None)))
        self.config = self.cls.Config.with_preset(None, **keys)

    def _plan(self, stored: Mapping[str, Stored], weights: Mapping[str, Tensor]) -> dict[str, tuple[list[str], Weight]]:
        plan = {}
        for name, found in stored.items():
            ours = name.removeprefix(PREFIX)
            if ours not in weights:
                if ours == "head.weight":  # written beside the embedding it equals
                    continue
                raise ShapeError(f"{self.folder} has a tensor {name}, which its configuration does not describe")
            how = Weight(name, (ours,))
            _check(name, found.shape, [tuple(weights[ours].shape)], how, self.folder)
            plan[name] = [ours], how
        return plan


def folder_of(folder: Path) -> TransformersFolder:
    """A folder of transformers' form; one with treadle's own keys is read as they say. InputError where its code is needed."""
    table = read_json(folder / CONFIG_FILE)
    own = table.get(OWN_KEYS)
    if not isinstance(own, dict):
        return TransformersFolder(folder, table)
    if ":" in (arch := str(own.get("arch"))):
        raise InputError(f"{folder} is for transformers, of an architecture in {arch}: treadle runs no code of an export; use the run, or an "
                         "export with --format treadle")  # fmt: skip
    return WithCode(folder, table)
