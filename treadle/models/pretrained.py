"""Finding and loading what was trained: a run, one of its checkpoints, a saved model folder, or a model of Hugging Face's."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treadle import terminal, trusted_code
from treadle.checkpoint.fetching import fetched_run
from treadle.checkpoint.layout import MANIFEST, checkpoint_name, steps_in
from treadle.checkpoint.reader import Checkpoint, newest_valid
from treadle.checkpoint.retention import best_step
from treadle.data.shards import file_sha256
from treadle.errors import CheckpointError, ConfigError, InputError
from treadle.files import cache_root, write_atomically
from treadle.generation.sampling import stored_defaults
from treadle.layers import packed_weights, quantized_files
from treadle.models import base
from treadle.models.adapters import adaptable, merged
from treadle.models.base import CONFIG_FILE, Model, ModelConfig, allocated, build
from treadle.models.catalogue import MODELS
from treadle.models.huggingface import hub
from treadle.models.huggingface.peft import PeftFolder, is_peft
from treadle.models.huggingface.reading import ForeignModel, folder_of, is_foreign
from treadle.models.settings import AdapterSettings
from treadle.storage.remote import RemotePath, is_url, local_copy, refuse_secrets
from treadle.text.base import Tokenizer

GENERATION_FILE = "generation_config.json"  # the name and keys that Hugging Face folders have
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


@dataclass
class Loaded:
    """A trained model with what goes with it."""

    model: Model
    tokenizer: Tokenizer | None  # of models of text
    checkpoint: Checkpoint
    config: dict[str, Any]  # the checkpoint's config.toml


def locate(run: str, warn: Any = None) -> Checkpoint:
    """RUN (a run folder, a checkpoint folder, `last`, RUN@best, RUN@STEP) -> its checkpoint, verified when it is the
    newest of a run; also a folder of transformers, of peft's, a .gguf file, or a name of the Hugging Face hub (NAME@REVISION).
    InputError when there is nothing there."""
    if is_url(run):
        return _remote(run, warn or _warn)
    name, _, choice = run.partition("@")
    path = Path(name)
    if is_peft(path):
        return PeftFolder(path, locate, plain_weights)
    if is_foreign(path):
        if choice:
            raise InputError(f"{path} holds one set of weights, so @{choice} means nothing; leave it out")
        return open_foreign(path)
    if not path.exists() and hub.is_hub_name(name) and not _instead_of(path):
        return open_foreign(hub.fetched(name, choice or None))
    if name == "last" and not path.exists():
        path = _last_run()
    if path.is_file():
        if path.suffix in PICKLE_SUFFIXES:
            raise InputError(f"{path} looks like a pickle, which treadle never reads; "
                             f"{_instead_of(path) or 'convert it to safetensors first'}")  # fmt: skip
        raise InputError(f"{path} is a file; give a run folder or a checkpoint folder")
    if not path.is_dir():
        meant = _instead_of(path)
        if meant:
            raise InputError(f"{path} does not exist; {meant}")
        runs = [p for p in sorted(Path("runs").glob("*")) if checkpoint_root(p).is_dir()] if Path("runs").is_dir() else []
        known = ", ".join(str(p) for p in runs[:10])
        raise InputError(f"{path} does not exist" + (f"; there is: {known}" if known else "; train one: treadle train"))
    if (path / MANIFEST).is_file():
        return Checkpoint(path)
    root = checkpoint_root(path)
    if choice == "best":
        step = best_step(root)
        if step is None:
            raise InputError(f"{path} has no best checkpoint: nothing was evaluated; use {path} or {path}@STEP")
        return Checkpoint(root / checkpoint_name(step))
    if choice:
        if not choice.isdigit() or int(choice) not in steps_in(root):
            have = ", ".join(str(s) for s in sorted(steps_in(root))) or "none"
            raise InputError(f"{run}: no checkpoint of step {choice!r} (there is: {have}, and best)")
        return Checkpoint(root / checkpoint_name(int(choice)))
    found = newest_valid(root, warn or _warn, quarantine=False)
    if found is None:
        inside = ", ".join(str(p) for p in sorted(path.glob("*")) if checkpoint_root(p).is_dir())
        raise InputError(f"{path} holds no checkpoint; " + (f"there are runs in it: {inside}" if inside else "train it: treadle train"))
    return found


def _remote(url: str, warn: Any) -> Checkpoint:
    """What a URL names: a run's copy (URL@best, URL@STEP), one of its checkpoints, or a folder of transformers."""
    refuse_secrets(url)
    folder, _, last = url.rpartition("/")
    name, _, choice = last.partition("@")
    source = RemotePath(f"{folder}/{name}")
    if not choice and (source / "config.json").is_file():
        return locate(str(local_copy(source, cache_root(None))))
    return fetched_run(source, choice, cache_root(None), warn)


def open_foreign(path: Path) -> ForeignModel:
    """What `is_foreign` found."""
    if path.suffix.lower() == ".gguf":
        from treadle.models.huggingface.gguf_file import GGUFFile  # here, since most never need its package

        return GGUFFile(path)
    return folder_of(path)


def _instead_of(path: Path) -> str:
    """What a run's checkpoint is called here, for names that other trainers give (best_model, best.pt, step_5000.pt)."""
    homes = [p for p in path.parents if (p / "config.toml").is_file()]
    run = str(homes[0]) if homes else "RUN"
    number = re.fullmatch(r"(?:step|checkpoint|ckpt|model|iter|epoch)[_-]?(\d+)", path.stem)
    if re.fullmatch(r"best([_-]?(model|checkpoint|ckpt))?|(model|checkpoint|ckpt)[_-]?best", path.stem):
        return f"the best checkpoint of a run is {run}@best"
    if number:
        return f"the checkpoint of a step is {run}@{int(number[1])}"
    if re.fullmatch(r"(last|latest|final)([_-]?(model|checkpoint|ckpt))?", path.stem) and path.stem != "last":
        return f"the newest checkpoint of a run is {run}"
    return ""


def _warn(text: str) -> None:
    terminal.write(f"warning: {text}", sys.stderr)


def _last_run() -> Path:
    runs = [p for p in Path("runs").glob("*") if (p / "config.toml").is_file()] if Path("runs").is_dir() else []
    if not runs:
        raise InputError("there is no run in runs/ yet; train one: treadle train")
    return max(runs, key=lambda p: max((f.stat().st_mtime for f in p.glob("*.jsonl")), default=p.stat().st_mtime))


def checkpoint_root(run: Path) -> Path:
    """Where a run's checkpoints are; its config.toml may name another place."""
    try:
        configured = tomllib.loads((run / "config.toml").read_text("utf-8")).get("checkpoint", {}).get("checkpoint_dir")
    except (OSError, ValueError, AttributeError, RecursionError):
        configured = None
    return Path(configured) if configured and isinstance(configured, str) else run / "checkpoints"


def home_of(checkpoint: Path) -> Path:
    """The run of a checkpoint's folder, or the folder in which it lies."""
    parent = checkpoint.resolve().parent
    return parent.parent if parent.name == "checkpoints" else parent


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The tables of a checkpoint's config.toml; CheckpointError when it cannot be read or holds no sections."""
    try:
        config = tomllib.loads(checkpoint.text("config.toml"))
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{checkpoint.folder}/config.toml cannot be read: {problem}") from None
    if not all(isinstance(section, dict) for section in config.values()):
        raise CheckpointError(f"{checkpoint.folder}/config.toml does not hold sections")
    trusted_code.recall(config)
    return config


def read_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer inside a checkpoint, from its verified bytes; None for a model that reads no text."""
    if isinstance(checkpoint, PeftFolder):
        return checkpoint.own_tokenizer() or read_tokenizer(checkpoint.base)
    if isinstance(checkpoint, ForeignModel):
        return checkpoint.tokenizer()
    if not checkpoint.members("tokenizer/"):
        return None
    with tempfile.TemporaryDirectory(prefix="treadle-") as folder:
        for member in checkpoint.members("tokenizer/"):
            Path(folder, Path(member).name).write_bytes(checkpoint.raw(member))
        return Tokenizer.load(folder)


def tokenizer_to_start_with(checkpoint: Checkpoint, chosen: str) -> Tokenizer | None:
    """The tokenizer of the weights that a run starts from; of a model of somebody else's, only where none is chosen."""
    if isinstance(checkpoint, PeftFolder):
        own = checkpoint.own_tokenizer() if chosen == "auto" or not isinstance(checkpoint.base, ForeignModel) else None
        return own or tokenizer_to_start_with(checkpoint.base, chosen)
    if isinstance(checkpoint, ForeignModel):  # rows of training begin without the token that a prompt begins with
        return checkpoint.own_tokenizer() if chosen == "auto" else None
    return read_tokenizer(checkpoint)


def read_shape(checkpoint: Checkpoint, config: dict[str, Any]) -> tuple[type[Model], ModelConfig]:
    """The architecture and its configuration that a checkpoint's config.toml describes. CheckpointError when it names
    none."""
    keys = dict(config.get("model", {}))
    arch, _ = keys.pop("arch", None), keys.pop("preset", None)
    if arch is None:
        raise CheckpointError(f"{checkpoint.folder}/config.toml names no architecture")
    cls = MODELS.get(str(arch))
    return cls, cls.Config.with_preset(None, **keys)


def read_adapters(checkpoint: Checkpoint) -> AdapterSettings | None:
    """How the adapters that a checkpoint holds were trained; None where it holds whole weights."""
    if isinstance(checkpoint, ForeignModel) or checkpoint.manifest.get("weights_only"):
        return None
    return AdapterSettings.of(read_config(checkpoint))


def base_of(settings: AdapterSettings, of: str) -> Checkpoint:
    """The frozen model of adapters; InputError where it is not there, CheckpointError where it has other weights. of: what
    needs it, for messages."""
    try:
        base = locate(str(settings.base_model))
    except InputError as problem:
        raise InputError(f"the frozen model of {of} is not where it was ({problem}). Say where it is: treadle train ... --base_model "
                         "FOLDER, or base_model under [adapter] in the run's config.toml") from None  # fmt: skip
    found = weights_checksum(base)
    if found != settings.base_checksum:
        raise CheckpointError(f"{base.folder} has other weights than the frozen model of {of} had (checksum {found[:12]} instead of "
                              f"{str(settings.base_checksum)[:12]}): adapters work with the weights they were trained on alone. Bring those "
                              "back, or say where they are with --base_model FOLDER")  # fmt: skip
    return base


def weights_checksum(checkpoint: Checkpoint) -> str:
    """sha256 over those of the files that hold the weights (of a run with adapters, over its base's too)."""
    if isinstance(checkpoint, PeftFolder):
        sums = [checkpoint.digest, weights_checksum(checkpoint.base)]
    elif isinstance(checkpoint, ForeignModel):
        path = Path(checkpoint.folder)
        sums = [file_sha256(file) for file in ([path] if path.is_file() else sorted(path.glob("*.safetensors")))]
    else:
        sums = [entry["sha256"] for name, entry in sorted(checkpoint.manifest["files"].items()) if name.startswith("model")]
        if (settings := read_adapters(checkpoint)) is not None:
            sums.append(str(settings.base_checksum))
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()


def whole_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights of a checkpoint by name; of a run with adapters, those of its base with the adapters merged. Of any
    shapes."""
    found = adapters_and_base(checkpoint)
    if found is None:
        return checkpoint.tensors("model")
    weights, model = plain_weights(found[1])
    return merged(weights, checkpoint.tensors("model"), found[0], list(adaptable(model)))


def adapters_and_base(checkpoint: Checkpoint) -> tuple[AdapterSettings, Checkpoint] | None:
    """How the adapters of a checkpoint were trained, and the frozen model they go with, as `base_of`; None for whole weights."""
    if (settings := read_adapters(checkpoint)) is None:
        return None
    home = home_of(checkpoint.folder)
    with contextlib.suppress(OSError, ValueError, ConfigError):  # said anew there, where the base was moved
        told = AdapterSettings.of(tomllib.loads((home / "config.toml").read_text("utf-8")))
        settings.base_model = told.base_model if told is not None else settings.base_model
    return settings, base_of(settings, str(home))


def plain_weights(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], Model]:
    """`whole_weights` with nothing packed or quantised, and the model without memory that they belong to. Of any shapes."""
    cls, shape = read_shape(checkpoint, read_config(checkpoint))
    with torch.device("meta"):
        model = cls(shape)
    weights, _ = quantized_files.unpack(model, whole_weights(checkpoint))
    return packed_weights.unpack(model, weights)[0], model


def generation_defaults(folder: Path) -> dict[str, Any]:
    """What the generation_config.json of a checkpoint's folder, or of its run, says; {} when there is none."""
    path, table = generation_file(folder)
    return stored_defaults(table, str(path))


def generation_file(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The generation_config.json of a checkpoint's folder or of its run, as it is; {} when there is none. Of adapters: their base's.
    ConfigError when it is not JSON or holds no table."""
    if is_peft(folder) and isinstance(adapter := locate(str(folder)), PeftFolder):
        return generation_file(adapter.base.folder)
    for place in (folder, home_of(folder)):
        path = place / GENERATION_FILE
        if path.is_file():
            try:
                table = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as problem:
                raise ConfigError(f"{path} is not JSON: {problem}") from None
            if not isinstance(table, dict):
                raise ConfigError(f"{path} holds no table")
            return path, table
    return folder / GENERATION_FILE, {}


def keep_generation_file(checkpoint: Checkpoint, run: Path) -> None:
    """A run that starts from a model of somebody else's takes its generation_config.json along, for its exports too."""
    if isinstance(checkpoint, (ForeignModel, PeftFolder)) and not (run / GENERATION_FILE).exists():
        _, table = generation_file(checkpoint.folder)
        if table:
            write_atomically(run / GENERATION_FILE, json.dumps(table, indent=1) + "\n")


def load_run(run: str, device: Any = None, warn: Any = None, tokenizer: bool = True) -> Loaded:
    """The model (in evaluation mode) and tokenizer of a run. tokenizer: whether a model of somebody else's has to have one."""
    checkpoint = locate(run, warn)
    config = read_config(checkpoint)
    cls, shape = read_shape(checkpoint, config)
    if isinstance(checkpoint, ForeignModel):
        model = _foreign_model(checkpoint, device)
        return Loaded(model.eval(), checkpoint.tokenizer() if tokenizer else None, checkpoint, config)
    weights = whole_weights(checkpoint)
    model = allocated(cls, shape, sum(tensor.nbytes for tensor in weights.values()), pick_device(device or "auto"))
    model.load_weights(weights)
    wanted = tokenizer or not isinstance(checkpoint, PeftFolder)
    return Loaded(model.eval(), read_tokenizer(checkpoint) if wanted else None, checkpoint, config)


def _foreign_model(checkpoint: ForeignModel, device: Any) -> Model:
    model = allocated(checkpoint.cls, checkpoint.config, checkpoint.nbytes, pick_device(device or "auto"))
    checkpoint.load_into(model)
    return model


def from_pretrained(folder: str | Path, device: Any = "cpu", trust_code: Iterable[str] = ()) -> Model:
    """A model from a folder that `save_pretrained`, transformers or peft wrote, a .gguf file, or a name of the Hugging Face hub, in
    fp32. Raises InputError or CheckpointError with the reason, and ConfigError where the folder names code that `trust_code`
    does not, or where a model's config.json asks for what is not computed."""
    path = Path(folder)
    if is_peft(path):
        return load_run(str(path), device, tokenizer=False).model
    if is_foreign(path) or (not path.exists() and hub.is_hub_name(str(folder).partition("@")[0])):
        checkpoint = locate(str(folder))
        assert isinstance(checkpoint, ForeignModel)
        return _foreign_model(checkpoint, device)
    return base.from_pretrained(folder, device, trust_code)


def tokenizer_of(loaded: Loaded) -> Tokenizer:
    """The tokenizer of a model of text; ConfigError for any other."""
    if loaded.tokenizer is None:
        raise ConfigError(f"{loaded.checkpoint.folder} holds a model that reads no text, so there is nothing to generate; "
                          "treadle eval shows its samples")  # fmt: skip
    return loaded.tokenizer


def load_model(source: str, device: Any = None, pretrained: bool = True) -> Model:
    """A model from a run, a checkpoint, or a folder of save_pretrained; a preset's name only with pretrained=False.
    ConfigError for such a name without it."""
    presets = {name: arch for arch in MODELS.names() for name in MODELS.get(arch).Config.presets()}
    plain = source.lower().replace("-", "_")
    if plain in presets and not Path(source).exists():
        if pretrained:
            raise ConfigError(f"{source!r} is a preset, a shape without weights: give a run or a model folder for trained "
                              "weights, or say pretrained=False for random ones")  # fmt: skip
        return build(presets[plain], plain, device=pick_device(device or "auto"))
    if (Path(source) / CONFIG_FILE).is_file() and not (Path(source) / MANIFEST).is_file() and not is_foreign(Path(source)):
        return base.from_pretrained(source, pick_device(device or "auto"))
    return load_run(source, device, tokenizer=False).model


def pick_device(name: Any, number: int | None = None) -> torch.device:
    """auto -> a GPU where there is one, else the CPU; ConfigError for a device that is not here. `number` is which GPU one
    of several processes takes when `name` leaves it open."""
    if isinstance(name, torch.device):
        return name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and number is not None:
        name = f"cuda:{number}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"run.device = {name!r}: use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"run.device = {name!r}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"run.device = {name!r}, but this machine has {torch.cuda.device_count()} GPU(s); use "
                          "--device cpu")  # fmt: skip
    return device
