"""The contract every architecture keeps. The trainer, evaluator, generator and planner know nothing else of a model.

Nothing here or in any model file knows training or devices: a model is single-device maths on a Batch.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from treadle import trusted_code
from treadle.checkpoint.tensors import read_tensors, write_tensors
from treadle.data.batch import Batch
from treadle.errors import CheckpointError, ConfigError, InputError, ShapeError
from treadle.generation.decode import generate
from treadle.generation.reading import remember
from treadle.layers import lora, packed_weights, quantized_files
from treadle.layers.bitlinear import BitLinear
from treadle.layers.state import State
from treadle.models.catalogue import MODELS
from treadle.ops.quick_start import empty_on, shapes_only
from treadle.ops.sharding import copy_whole
from treadle.registry import nearest
from treadle.settings import Given, Settings, build_section, option, plain

LM_HEAD = "lm_head"  # the head that gives the logits of tokens
WEIGHTS_IN_A_BYTE = 5  # ternary ones, packed
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


class ModelConfig(Settings):
    """Base of an architecture's own keys; every key of a model is fixed once a run has started."""

    model_config = ConfigDict(frozen=False)
    called: ClassVar[str] = "model"

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """Name -> keys. A preset is a shape; its weights are random until trained."""
        return {}

    @classmethod
    def recommended(cls, preset: str | None) -> dict[str, Any]:
        """Training values that go with a preset, as dotted keys; the weakest layer above section defaults."""
        return {}

    def implied(self) -> dict[str, Any]:
        """Training values, as dotted keys, that follow from these where nothing else sets them."""
        return {}

    @classmethod
    def with_preset(cls, preset: str | None, **keys: Any) -> ModelConfig:
        """A fresh config from a preset and keys that override it; ConfigError for unknown names or bad values."""
        table: dict[str, Any] = {}
        if preset is not None:
            presets = {name.lower().replace("-", "_"): values for name, values in cls.presets().items()}
            name = preset.lower().replace("-", "_")
            if name not in presets:
                raise ConfigError(f"model.preset = {preset!r}: {nearest(name, list(presets))}")
            table = dict(presets[name])
        aliases = {alias: key for key in cls.model_fields for alias in cls.key_info(key)["aliases"]}
        for word, value in keys.items():  # a config.toml of an older version may have an older name
            key = word if word in cls.model_fields else aliases.get(word, word)
            if key != word and key in keys:
                raise ConfigError(f"model.{key} is given twice, also as {word}; keep one")
            spellings = cls.key_info(key)["spellings"] if key in cls.model_fields and isinstance(value, (str, bool)) else {}
            table[key] = spellings.get(plain(str(value)), value)  # use_inl_dynamics=True, as a recipe may say it
        given = {f"model.{key}": Given(f"model.{key}", value, "arguments", False) for key, value in table.items()}
        return build_section("model", cls, given)  # type: ignore[return-value]


class LanguageModelConfig(ModelConfig):
    """Base of the keys of models that read and predict tokens."""

    vocab_size: int = option(256, ge=2)
    """Number of tokens; defaults to the tokenizer's."""


@dataclass
class Output:
    """What a forward pass gives. logits [B, T, V] of the head lm_head; hidden [B, T, D] (before the heads); predictions: what
    other heads give, by name; losses: name -> (sum, unit)."""

    logits: Tensor | None = None
    hidden: Tensor | None = None
    predictions: dict[str, Tensor] = field(default_factory=dict)
    state: State | None = None
    losses: dict[str, tuple[Tensor, str]] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Capabilities:
    """What a model promises; a contract test is skipped only where one of these is declared False."""

    causal: bool = True
    decodes: bool = True
    packs: bool = True
    dynamic_lengths: bool = False
    rounds: bool = False  # its forward pass rounds weights, so that a last bit may move a result by more than a last bit


@dataclass(frozen=True)
class ParameterRule:
    """How the optimiser treats one parameter beyond the default (matrices decay, vectors do not)."""

    learning_rate_multiplier: float = 1.0
    weight_decay: bool | None = None
    matrix: bool = True  # False: two dimensions but no matrix product, so Muon leaves it to AdamW
    width_ratio: float = 1.0  # muP: the width at which a rate was found over this matrix's; each optimiser knows what follows


class Model(nn.Module):
    """Base of every architecture."""

    arch: ClassVar[str]
    Config: ClassVar[type[ModelConfig]]
    capabilities: Capabilities = Capabilities()
    config: Any  # a Config
    head: nn.Linear  # of models that predict tokens
    logit_softcap: float | None = None  # the head's logits z are c tanh(z / c) of `linear_head`'s product
    adapted: bool = False  # adapters are trained on weights that are not (models/adapters.py)
    _start: Mapping[str, Tensor] = MappingProxyType({})  # values to start with instead of random ones

    def __init_subclass__(cls, abstract: bool = False, **keys: Any) -> None:
        """A class without a name of its own is called by its class's."""
        super().__init_subclass__(**keys)
        if not hasattr(cls, "arch") and not abstract:
            cls.arch = cls.__name__

    # ---- what an architecture writes ----

    @abstractmethod
    def hidden(self, batch: Batch, state: State | None = None) -> Output:
        """Everything before the heads: Output with hidden [B, T, D], the state when one was given, losses and stats."""

    def new_state(self, batch_size: int, max_len: int, device: Any = None, dtype: Any = None) -> State:
        """An empty decoding state; device and dtype default to the model's. Models with capabilities.decodes have one.
        ConfigError for others."""
        raise ConfigError(f"the model {self.arch} does not decode, so it has no state")

    def blocks(self) -> list[nn.Module]:
        """The units for checkpointing, compiling and sharding, in order."""
        return []

    def heads(self) -> dict[str, nn.Module]:
        """What turns the hidden states into predictions, by name; next-token training and generation use lm_head."""
        return {LM_HEAD: self.head} if hasattr(self, "head") else {}

    @property
    def width(self) -> int:
        """Features that most matrix products read, on which the choice of a number format rests."""
        if LM_HEAD in self.heads():
            return int(self.head.weight.shape[1])
        widths = [p.shape[1] for p in self.parameters() if p.dim() == 2]
        return max(set(widths), key=widths.count, default=1)

    @property
    def vocab_size(self) -> int:
        """How many tokens lm_head tells apart; ConfigError for a model that predicts none, or does not say."""
        if LM_HEAD not in self.heads():
            raise ConfigError(f"the model {self.arch} has no head called {LM_HEAD}: it predicts no tokens")
        if getattr(self.config, "vocab_size", None) is None:
            raise ConfigError(f"the Config of the model {self.arch} has no key vocab_size, from which it learns how many tokens there are; "
                              "make it a class of treadle.LanguageModelConfig, which has one")  # fmt: skip
        return int(self.config.vocab_size)

    @property
    def longest_row(self) -> int | None:
        """Tokens that a row may have, prompt and continuation together; None: any number."""
        return None

    def token_mixers(self) -> list[nn.Module]:
        """The modules that mix positions (attention and its like), one per block, in order; what distillation matches."""
        return []

    def run_token_mixers(self, given: list[Tensor], batch: Batch) -> list[Tensor]:
        """What each token mixer makes of an input of its own, [B, T, D] each; for models with `token_mixers`."""
        raise NotImplementedError

    def full_precision_modules(self) -> list[nn.Module]:
        """Modules inside blocks (routers, quantiser scales) whose weights stay fp32 where blocks are gathered in bf16:
        ternary layers, and what an architecture adds."""
        return [module for block in self.blocks() for module in block.modules() if isinstance(module, BitLinear)]

    def flops(self, length: int) -> int:
        """Floating-point operations of one row's forward pass: 2 a multiply-add of the matrix products, attention in
        full (the causal half that some paths skip is counted, as is customary). Here: each matrix once a position."""
        return 2 * length * sum(p.numel() for p in self.parameters() if p.dim() == 2)

    def initial(self, name: str, parameter: Tensor) -> float | str | Tensor:
        """How a parameter starts: "zeros", "ones", the standard deviation of a normal distribution, or its values. Here:
        vectors called bias at 0, other vectors (norms) at 1, matrices with deviation 1 / sqrt(inputs), embeddings .02.
        Of any shape; values have the parameter's."""
        if parameter.dim() < 2:
            return "zeros" if name.endswith("bias") else "ones"
        return 0.02 if "embedding" in name else float(parameter[0].numel()) ** -0.5

    def linear_head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(inputs [..., D], weight [V, D]) whose product is the logits (before `logit_softcap`), for losses that never hold all
        of them."""
        return self.head.linear(hidden) if isinstance(self.head, BitLinear) else (hidden, self.head.weight)

    def tie(self) -> None:
        """Restores shared parameters after materialising from the meta device."""

    def parameter_rules(self) -> dict[str, ParameterRule]:
        """Parameter name -> rule, for parameters that are treated specially."""
        return {}

    def inspect(self, batch: Batch) -> dict[str, float]:
        """Numbers worth watching beyond the loss, read on a few rows at each evaluation and by `treadle eval --stats`."""
        return {}

    def state_bytes(self, batch_size: int, max_len: int) -> int:
        """Bytes of a decoding state, as documented by the architecture; a contract checks it against `nbytes`."""
        with torch.device("meta"):
            return self.new_state(batch_size, max_len, device="meta").nbytes

    # ---- what every architecture has ----

    def forward(self, batch: Batch, state: State | None = None) -> Output:
        """batch [B, T] -> Output with logits [B, T, V] and the predictions of other heads. With a state, positions go on
        from it and each row is one document; padding (doc_id -1) leaves its row's state as it was."""
        out = self.hidden(batch, state)
        for name, head in self.heads().items():
            if name == LM_HEAD:
                out.logits = head(out.hidden)
            else:
                out.predictions[name] = head(out.hidden)
        return out

    @classmethod
    def example(cls, config: ModelConfig, batch_size: int = 2, length: int = 16, seed: int = 0) -> Batch:
        """A batch this architecture can train on, for tests and planning."""
        generator = torch.Generator().manual_seed(seed)
        vocab_size = getattr(config, "vocab_size", 2)
        return Batch.for_training(torch.randint(0, vocab_size, (batch_size, length), generator=generator))

    def start_from(self, tensors: dict[str, Tensor]) -> list[str]:
        """Parameters of these names and shapes will start with these values when the model is allocated; returns which.
        Of any shapes."""
        own = {name: p.shape for name, p in self.named_parameters()}
        self._start = {name: t.detach() for name, t in tensors.items() if own.get(name) == t.shape}
        return sorted(self._start)

    def materialise(self, seed: int, device: Any = "cpu") -> Model:
        """Allocates parameters (from the meta device too) and initialises each from (seed, its name)."""
        if any(p.is_meta for p in self.parameters()):
            self._apply(lambda tensor: empty_on(device, tensor))  # type: ignore[no-untyped-call]  # torch's own
            self.tie()
        else:
            self.to(device)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                copy_whole(parameter, self._initial_values(seed, name, parameter))
        self.__dict__.pop("_start", None)
        return self

    def _initial_values(self, seed: int, name: str, parameter: Tensor) -> Tensor:
        if name in self._start:
            return self._start[name].cpu()
        if not parameter.is_floating_point():  # weights held in 8 bits, which come from a file
            return torch.zeros(parameter.shape, dtype=parameter.dtype)
        rule = lora.start_of(name, parameter) or self.initial(name, parameter)
        if isinstance(rule, Tensor):
            return rule
        if rule == "zeros":
            return torch.zeros(parameter.shape)
        if rule == "ones":
            return torch.ones(parameter.shape)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(parameter.shape, generator=generator) * float(rule)

    def named_weights(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer once, by its checkpoint name; shared ones under their first name. Of
        any shapes."""
        persistent = set(self.state_dict(keep_vars=True))
        buffers = {name: b for name, b in self.named_buffers() if name in persistent}
        return {**dict(self.named_parameters()), **buffers}

    def trained_weights(self) -> dict[str, Tensor]:
        """What a checkpoint of a training holds: all of them, of a model with adapters these alone. Of any shapes."""
        return {name: t for name, t in self.named_weights().items() if not self.adapted or lora.is_adapter(name)}

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Copies `trained_weights` in by name, ternary layers packed or not, linear ones quantised or not; ShapeError names
        what is missing, surplus or of another shape. Of any shapes."""
        tensors, layers = quantized_files.unpack(self, tensors)
        tensors, quantized = packed_weights.unpack(self, tensors)
        self.refuse_other_weights({name: list(tensor.shape) for name, tensor in tensors.items()})
        with torch.no_grad():
            for name, tensor in self.trained_weights().items():
                copy_whole(tensor, tensors[name])
        for name, (ternary, scale) in quantized.items():
            self.get_submodule(name).cache_quantized(ternary, scale)  # type: ignore[operator]
        if layers:
            remember(self, layers, "int4" if any(matrix.kind == "int4" for matrix in layers.values()) else "int8")

    def refuse_other_weights(self, shapes: dict[str, list[int]], wanted: Mapping[str, Tensor] | None = None) -> None:
        """ShapeError unless these are the names and shapes of `trained_weights`, or of what is wanted. Shapes as lists,
        [N, K] of a matrix."""
        own = {name: list(tensor.shape) for name, tensor in (self.trained_weights() if wanted is None else wanted).items()}
        missing, surplus = sorted(own.keys() - shapes.keys()), sorted(shapes.keys() - own.keys())
        wrong = [f"{n} {shapes[n]} instead of {own[n]}" for n in own.keys() & shapes.keys() if own[n] != shapes[n]]
        problems = [f"missing: {', '.join(missing[:4])}"] if missing else []
        problems += [f"not in this model: {', '.join(surplus[:4])}"] if surplus else []
        problems += [f"another shape: {', '.join(sorted(wrong)[:4])}"] if wrong else []
        if problems:
            raise ShapeError(f"the weights belong to another model ({'; '.join(problems)}); use the checkpoint's own "
                             "config.toml, or start anew with --fresh")  # fmt: skip

    def parameter_count(self) -> int:
        """How many numbers all parameters hold; shared ones count once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.parameters()).dtype

    def generate(self, input_ids: Any, max_new_tokens: int = 100, **options: Any) -> Tensor:
        """Prompt ids [B, T] -> [B, T + new] int64. Options: generation/decode.py's `generate`."""
        return generate(self, input_ids, max_new_tokens, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, which `from_pretrained` reads back bit for bit."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(describe(type(self), self.config), encoding="utf-8")
        write_tensors(folder / WEIGHTS_FILE, self.named_weights(), {"format": "pt"})


def describe(cls: type[Model], config: ModelConfig) -> str:
    """The text of config.json."""
    table = {"model_type": trusted_code.place_of(cls) or cls.arch, "architectures": [cls.__name__], **config.model_dump()}
    return json.dumps(table, indent=1) + "\n"


def build(
    arch: str | type[Model] = "transformer", preset: str | None = None, seed: int = 0, device: Any = "cpu", trust_code: Iterable[str] = (),
    **keys: Any,
) -> Model:  # fmt: skip
    """A randomly initialised model: `build("transformer", hidden_size=256)`, or of a class of one's own. trust_code: files that keys may
    name classes of, as in layer_types=["mine.py:Mine"]. ConfigError for bad names or values."""
    trusted_code.allow_names(arch)
    trusted_code.allow(trust_code)
    cls = MODELS.get(arch) if isinstance(arch, str) else arch
    return build_from(cls, cls.Config.with_preset(preset, **keys), seed, device)


def build_from(cls: type[Model], config: ModelConfig, seed: int = 0, device: Any = "cpu") -> Model:
    """A model of a class and its configuration, with random weights that are a function of the seed. ConfigError for one that would decode
    and has no new_state."""
    with shapes_only():
        model = cls(config)
    if model.capabilities.decodes and cls.new_state is Model.new_state:  # else training would end at its first sample
        raise ConfigError(f"the model {model.arch} has no new_state(batch_size, max_len, device=None, dtype=None), with which it would decode; add "
                          "it, or say in the class that it does not: capabilities = treadle.Capabilities(decodes=False)")  # fmt: skip
    return model.materialise(seed, device)


def from_pretrained(folder: str | Path, device: Any = "cpu", trust_code: Iterable[str] = ()) -> Model:
    """A model from a folder that `save_pretrained` wrote. Raises InputError or CheckpointError with the reason, and
    ConfigError where the folder names code that `trust_code` does not."""
    folder = Path(folder)
    trusted_code.allow(trust_code)
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{folder} holds no {CONFIG_FILE}; give a folder that save_pretrained wrote, or a run")
    try:
        described = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        arch = described.pop("model_type")
        described.pop("architectures", None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise CheckpointError(f"{folder / CONFIG_FILE} is damaged: {problem}") from None
    cls = MODELS.get(str(arch))
    weights = read_tensors(folder / WEIGHTS_FILE)
    model = allocated(cls, cls.Config.with_preset(None, **described), sum(t.nbytes for t in weights.values()), device)
    model.load_weights(weights)
    return model


def allocated(cls: type[Model], config: ModelConfig, nbytes: int, device: Any) -> Model:
    """A model with memory for its weights, where files of `nbytes` can hold those: a description from elsewhere may ask for any
    size. ShapeError when they cannot."""
    try:
        with shapes_only():
            model = cls(config)
    except (RuntimeError, OverflowError) as problem:  # sizes beyond 64 bits
        raise ShapeError(f"the configuration describes a model that cannot be: {problem}") from None
    if model.parameter_count() > WEIGHTS_IN_A_BYTE * nbytes:
        raise ShapeError(f"the configuration describes a model of {count_label(model.parameter_count())} parameters, and the "
                         "weights are far fewer; they belong to another model")  # fmt: skip
    model._apply(lambda tensor: empty_on(device, tensor))  # type: ignore[no-untyped-call]  # torch's own
    model.tie()
    return model


def parameter_count(cls: type[Model], config: ModelConfig) -> int:
    """Parameters of a configuration, counted on the meta device (no memory)."""
    with shapes_only():
        return cls(config).parameter_count()


def count_label(count: int) -> str:
    """125_000_000 -> "125M"."""
    for size, mark in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{mark}"
    return str(count)


def merged_stats(outputs: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each statistic over micro-batches. Each a scalar."""
    found: dict[str, list[Tensor]] = {}
    for stats in outputs:
        for name, value in stats.items():
            found.setdefault(name, []).append(value)
    return {name: torch.stack(values).mean() for name, values in found.items()}
