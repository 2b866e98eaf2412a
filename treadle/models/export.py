"""Export: the weights of a run, whole in one file, with what it takes to use them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treadle.checkpoint import writer
from treadle.checkpoint.layout import MANIFEST
from treadle.checkpoint.reader import Checkpoint
from treadle.checkpoint.tensors import write_tensors
from treadle.errors import CheckpointError, InputError
from treadle.files import write_atomically
from treadle.generation.reading import quantized as quantize_layers
from treadle.layers import packed_weights, quantized_files
from treadle.models import model_card
from treadle.models.base import CONFIG_FILE, WEIGHTS_FILE, Model, ModelConfig, allocated, describe
from treadle.models.huggingface.byte_tokenizer import byte_tokenizer_files
from treadle.models.huggingface.gguf_writing import TYPES, refuse_foreign_file, write_gguf, written_for_llama_cpp
from treadle.models.huggingface.modeling_file import with_code
from treadle.models.huggingface.peft import CONFIG as ADAPTER_CONFIG
from treadle.models.huggingface.peft import WEIGHTS as ADAPTER_WEIGHTS
from treadle.models.huggingface.peft import PeftFolder, family_for, files_of, for_peft
from treadle.models.huggingface.reading import OWN_KEYS, ForeignModel, is_foreign
from treadle.models.huggingface.reading import read_json as read_table
from treadle.models.huggingface.writing import TOKEN_KEYS, for_transformers
from treadle.models.model_card import run_name
from treadle.models.pretrained import (
    GENERATION_FILE,
    adapters_and_base,
    generation_defaults,
    generation_file,
    home_of,
    locate,
    read_adapters,
    read_config,
    read_shape,
    read_tokenizer,
    whole_weights,
)
from treadle.models.transformer import TransformerConfig
from treadle.text.base import Tokenizer
from treadle.text.byte import ByteTokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = {"treadle": "treadle", "huggingface": "huggingface", "hf": "huggingface", "transformers": "huggingface",
           "gguf": "gguf", "llama.cpp": "gguf", "peft": "peft"}  # fmt: skip


def export(
    run: str, output: str | None = None, precision: str = "fp32", packed: bool = False, warn: Any = None, layout: str | None = None,
    quantize: str | None = None, gguf_type: str | None = None, license: str | None = None, merge: bool = False,
) -> Path:  # fmt: skip
    """Writes config.json, model.safetensors and the tokenizer of a run (or checkpoint) and returns the folder, by default
    RUN/export. Shards are joined. `packed` stores ternary layers in 1.6 bits a weight; with fp32 for the rest, answers stay the
    same bit for bit. `quantize` (int8, int4) stores linear layers as they are read with these weights. The folder is checked like a
    checkpoint and serves wherever a run is asked for; `from_pretrained` reads it too. layout "huggingface" (by default in RUN/huggingface): as transformers and what builds on it read it; "gguf" (by default
    RUN/gguf/NAME-TYPE.gguf, which is returned): what llama.cpp reads, of `gguf_type` f32 (the default), f16 or q8_0. A model card is
    written beside, where no README.md of somebody's own is; license is what it states. Of a run with adapters: these alone, as peft
    reads them ("peft", by default in RUN/peft), unless `merge` or another layout asks for the whole model. InputError when the
    folder is in use for something else, or nothing in it is ternary; ConfigError for a model that writes no text
    token by token.
    """
    layout = _known(layout, precision, packed, quantize, gguf_type)
    checkpoint = locate(run, warn)
    config = read_config(checkpoint)
    cls, shape = read_shape(checkpoint, config)
    layout = _meant(layout, merge or packed or quantize is not None, read_adapters(checkpoint) is not None, run)
    if output is None and isinstance(checkpoint, (ForeignModel, PeftFolder)):
        raise InputError(f"{run} was not trained here, so say where the export goes: --output FOLDER")
    folder = Path(output) if output is not None else home_of(checkpoint.folder) / ("export" if layout == "treadle" else layout)
    file = _gguf_file(folder, run_name(checkpoint), gguf_type or "f32") if layout == "gguf" else None
    _refuse_foreign(folder) if file is None else _refuse_without_form(file, shape)
    with torch.device("meta"):
        model = cls(shape)
    if layout == "peft":
        return _as_peft(folder, checkpoint, shape, precision, license)
    weights, _ = quantized_files.unpack(model, whole_weights(checkpoint))
    weights, quantized = packed_weights.unpack(model, weights)
    model.refuse_other_weights({n: list(t.shape) for n, t in weights.items()})
    if file is not None:
        return _as_gguf(file, checkpoint, shape, weights, gguf_type or "f32", license)
    smaller: set[str] = set()
    if quantize is not None:
        whole, weights = weights, _quantized(cls, shape, weights, quantize)
        smaller = {name for name, tensor in weights.items() if name in whole and tensor.dtype != whole[name].dtype}
    if packed:
        if not packed_weights.ternary_layers(model):
            raise InputError(f"--packed: {run} has no ternary layers to pack; leave it out")
        weights = packed_weights.pack(model, weights)
        for name, (_, scale) in quantized.items():  # of an export that is packed already: the scale as it is
            weights[name + packed_weights.SCALE] = scale
    kept = (packed_weights.SCALE, quantized_files.SCALES)
    weights = {n: t if n.endswith(kept) or n in smaller or not t.is_floating_point() else t.to(DTYPES[precision]) for n, t in weights.items()}
    tokenizer = read_tokenizer(checkpoint)
    text = _tokenizer_members(checkpoint)
    if tokenizer is not None and not text:
        text = _files_of(tokenizer)
    if layout == "huggingface":
        weights, files = _for_transformers(cls, shape, weights, DTYPES[precision], tokenizer, generation_file(checkpoint.folder)[1])
        files.update(text)
    else:
        files = {"config.toml": checkpoint.raw("config.toml"), CONFIG_FILE: describe(cls, shape).encode()}
        files.update({f"tokenizer/{name}": data for name, data in text.items()})
        if told := generation_defaults(checkpoint.folder):
            files[GENERATION_FILE] = (json.dumps(told, indent=1) + "\n").encode()
    described = {"weights_only": True, "source": str(checkpoint.folder), "precision": precision, "packed": packed,
                 "quantized": quantize}  # fmt: skip
    code = any(name.startswith("modeling_") for name in files)
    card = model_card.card_of(checkpoint, layout, precision, license, folder, code, "tokenizer.json" in files)
    writer.save(folder.parent, checkpoint.step, {"model": weights}, files, described, name=folder.name, beside={model_card.FILE: card})
    return folder


def _meant(layout: str | None, whole: bool, adapters: bool, run: str) -> str:
    """The format to write; InputError for what does not go with a run with adapters, or without. whole: a flag asks for all weights."""
    if adapters and layout == "peft" and whole:
        raise InputError("--format peft holds the adapters alone; leave it out to merge them (or to pack or quantise the whole model)")
    if not adapters and layout == "peft":
        raise InputError(f"--format peft: {run} holds a whole model and no adapters; leave --format out")
    return layout or ("peft" if adapters and not whole else "treadle")


def _tokenizer_members(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The files of a checkpoint's tokenizer by their names alone."""
    if isinstance(checkpoint, PeftFolder):  # may have one of its own
        return {}
    return {Path(name).name: checkpoint.raw(name) for name in checkpoint.members("tokenizer/")}


def _as_peft(folder: Path, checkpoint: Checkpoint, shape: ModelConfig, precision: str, license: str | None) -> Path:
    """The adapters alone, with what peft asks for and the tokenizer."""
    found = adapters_and_base(checkpoint)
    assert found is not None
    settings, base = found
    table, tensors = for_peft(shape, checkpoint.tensors("model"), settings, str(base.folder.resolve()))
    files = files_of(table) | _tokenizer_members(checkpoint)
    described = {"weights_only": True, "source": str(checkpoint.folder), "precision": precision, "base_checksum": settings.base_checksum}
    card = model_card.card_of(checkpoint, "peft", precision, license, folder)
    tensors = {name: tensor.to(DTYPES[precision]) for name, tensor in tensors.items()}
    writer.save(folder.parent, checkpoint.step, {Path(ADAPTER_WEIGHTS).stem: tensors}, files, described, name=folder.name,
                beside={model_card.FILE: card})  # fmt: skip
    return folder


def told(written: Path, layout: str | None, precision: str, packed: bool, quantize: str | None) -> list[str]:
    """What the command line says of an export."""
    if (written / ADAPTER_CONFIG).is_file():
        size, base = (written / ADAPTER_WEIGHTS).stat().st_size, Path(read_table(written / ADAPTER_CONFIG)["base_model_name_or_path"])
        lines = [f"{written}: {size / 1e6:.1f} MB of adapters on {base}, for peft: PeftModel.from_pretrained(BASE, {str(written)!r}); treadle reads "
                 "it too (treadle export ... --merge writes the whole model)"]  # fmt: skip
        if not is_foreign(base):
            lines.append(f"note: peft needs the model under them as transformers has it: treadle export {base} --format huggingface")
        return lines
    layout = FORMATS[(layout or "treadle").lower()]
    size = (written if layout == "gguf" else written / WEIGHTS_FILE).stat().st_size
    if layout == "gguf":
        return [f"{written}: {size / 1e6:.1f} MB, for llama.cpp: llama-cli -m {written}; treadle reads it too"]
    if layout == "huggingface":
        code = next((path.name for path in written.glob("modeling_*.py")), None)
        own = ":" in str(read_table(written / CONFIG_FILE).get(OWN_KEYS, {}).get("arch"))  # an architecture of somebody's own
        how = f"{str(written)!r}, trust_remote_code=True" if code else repr(str(written))
        lines = [f"{written}: {size / 1e6:.1f} MB of weights in {precision}, for transformers: "
                 f"AutoModelForCausalLM.from_pretrained({how})" + ("" if own else "; treadle reads it too")]  # fmt: skip
        if code:
            lines.append(f"note: transformers has no such architecture; {code} beside the weights is its code, and needs torch and transformers alone")
        if not (written / "tokenizer.json").is_file() and not list(written.glob("*.model")):
            lines.append("note: this run's tokenizer has no form in transformers; give it the ids yourself")
        return lines
    ternary = (", ternary ones packed" if packed else "") + (f", linear layers in {quantize}" if quantize else "")
    return [f"{written}: {size / 1e6:.1f} MB of weights in {precision}{ternary}; use it like a run: treadle generate {written}, "
            f"treadle train --from {written}"]  # fmt: skip


def _known(layout: str | None, precision: str, packed: bool, quantize: str | None, gguf_type: str | None) -> str | None:
    """The format's own name, None where none is asked for; InputError for what is not known, or does not go together."""
    if layout is not None and layout.lower() not in FORMATS:
        raise InputError(f"--format {layout!r}: use treadle, huggingface for transformers, gguf for llama.cpp, or peft for adapters alone")
    layout = FORMATS[layout.lower()] if layout is not None else None
    if packed and layout not in (None, "treadle"):
        raise InputError(f"--packed is a format of treadle's own; leave it out, or leave --format {layout} out")
    if quantize is not None and quantize not in ("int8", "int4"):
        raise InputError(f"--quantize {quantize!r}: use int8 or int4 (for bf16: --precision bf16)")
    if quantize is not None and layout not in (None, "treadle"):
        instead = " (of a .gguf file: --gguf_type q8_0)" if layout == "gguf" else ""
        raise InputError(f"--quantize is a format of treadle's own{instead}; leave it out, or leave --format {layout} out")
    if precision not in DTYPES:
        raise InputError(f"--precision {precision!r}: use {', '.join(DTYPES)}")
    if gguf_type is not None and (layout != "gguf" or gguf_type not in TYPES):
        raise InputError(f"--gguf_type {gguf_type!r}: it goes with --format gguf and is one of {', '.join(TYPES)}")
    if layout == "gguf" and precision != "fp32":
        raise InputError(f"--precision {precision} is not for --format gguf; say --gguf_type {' or '.join(TYPES)}")
    return layout


def _gguf_file(output: Path, name: str, kind: str) -> Path:
    """The file that an export writes: `output` itself where it is called .gguf, else one in that folder."""
    return output if output.suffix.lower() == ".gguf" else output / f"{name}-{kind}.gguf"


def _is_newer(file: Path, than: float) -> bool:
    return file.is_file() and file.stat().st_mtime >= than


def _refuse_without_form(file: Path, shape: ModelConfig) -> None:
    """What llama.cpp has no form for, and a file of somebody else's, before any weight is read."""
    written_for_llama_cpp(shape)
    refuse_foreign_file(file)


def _as_gguf(
    file: Path, checkpoint: Checkpoint, shape: ModelConfig, weights: dict[str, Tensor], kind: str, license: str | None
) -> Path:
    tokenizer = read_tokenizer(checkpoint)
    template = tokenizer.chat_template.source if tokenizer is not None and tokenizer.chat_template is not None else None
    told = {"name": run_name(checkpoint), **({"license": license} if license is not None else {})}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(file, shape, weights, tokenizer, kind, template, told)
    written = checkpoint.folder.stat().st_mtime  # files of an earlier state of the run are not what the card describes
    there = [one for one in TYPES if one == kind or _is_newer(_gguf_file(file.parent, run_name(checkpoint), one), written)]
    card = model_card.card_of(checkpoint, "gguf", ", ".join(there), license, file.parent)
    write_atomically(file.parent / model_card.FILE, card.decode())
    return file


def _quantized(cls: type[Model], shape: ModelConfig, weights: dict[str, Tensor], quantize: str) -> dict[str, Tensor]:
    model = allocated(cls, shape, sum(t.nbytes for t in weights.values()), "cpu")
    model.load_weights(weights)
    return quantized_files.pack(model, weights, quantize_layers(model, quantize))


def save_for_transformers(model: Model, folder: str | Path, tokenizer: Tokenizer | None = None, precision: str = "fp32") -> None:
    """Writes a model (and its tokenizer) as `AutoModelForCausalLM.from_pretrained` reads it; where transformers has no such class, with
    a modeling file for trust_remote_code=True. ConfigError for a model that writes no text token by token."""
    weights, files = _for_transformers(type(model), model.config, model.named_weights(), DTYPES[precision], tokenizer, {})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in {**files, **(_files_of(tokenizer) if tokenizer is not None else {})}.items():
        (folder / name).write_bytes(data)
    write_tensors(folder / WEIGHTS_FILE, weights, {"format": "pt"})


def _files_of(tokenizer: Tokenizer) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="treadle-") as scratch:
        tokenizer.save(scratch)
        return {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}


def _for_transformers(
    cls: type[Model], shape: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype, tokenizer: Tokenizer | None, told: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, bytes]]:  # fmt: skip
    """(weights by transformers' names; config.json, generation_config.json, what a byte tokenizer is there, and for a model that
    transformers has no class of a modeling file)."""
    tokens: dict[str, Any] = dict.fromkeys(TOKEN_KEYS)  # a family's own would be written otherwise, whatever the vocabulary
    if tokenizer is not None:
        tokens |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    tokens |= {key: told[key] for key in TOKEN_KEYS if key in told}
    files: dict[str, bytes] = {}
    if isinstance(shape, TransformerConfig) and family_for(shape) is not None:
        table, renamed = for_transformers(shape, weights, dtype, tokens)
    else:
        table, renamed, files = with_code(cls, shape, weights, dtype, tokens)
    if tokenizer is not None and tokenizer.kind == ByteTokenizer.kind:
        files |= byte_tokenizer_files()
    defaults = {**{key: value for key, value in tokens.items() if value is not None}, **_ends_of_turns(tokenizer), **told}
    return renamed, {**files, CONFIG_FILE: (json.dumps(table, indent=1) + "\n").encode(),
                     GENERATION_FILE: (json.dumps(defaults, indent=1) + "\n").encode()}  # fmt: skip


def _ends_of_turns(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Where a conversation's turn ends in another token than a document, generation has to stop at both."""
    if tokenizer is None or tokenizer.chat_template is None:
        return {}
    ends = tokenizer.chat_template.further_ends(tokenizer)
    return {"eos_token_id": [tokenizer.eos_id, *ends]} if ends else {}


def _refuse_foreign(folder: Path) -> None:
    """An export may be replaced; nothing else is."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    if not folder.exists():
        return
    try:
        own = (folder / MANIFEST).is_file() and Checkpoint(folder).manifest.get("weights_only", False)
    except CheckpointError:
        own = False
    if not own:
        raise InputError(f"{folder} exists and is no export; give another folder with --output")
