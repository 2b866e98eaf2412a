"""A .gguf file (llama.cpp) as the folder of transformers it was made from: metadata -> config.json's table, names -> names.

Blocks of quantised numbers become fp32 a few rows at a time; nothing of the file is mapped into memory for longer.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treadle.errors import CheckpointError, ConfigError, InputError, MissingExtra
from treadle.models.huggingface.gguf_tokens import files_of
from treadle.models.huggingface.reading import ForeignModel, Stored
from treadle.settings import shown
from treadle.text.base import Tokenizer

FAMILY_OF = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}
# Metadata after "ARCHITECTURE." -> key of config.json.
KEYS = {
    "context_length": "max_position_embeddings", "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta", "attention.key_length": "head_dim", "vocab_size": "vocab_size",
}  # fmt: skip
# Metadata that is compared with what the model does, or says nothing about it.
CHECKED = ("rope.dimension_count", "attention.value_length", "rope.scaling.type", "rope.scaling.factor",
           "rope.scaling.original_context_length", "rope.scaling.finetuned")  # fmt: skip
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INSIDE = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


@dataclass(frozen=True)
class Blocks:
    """A tensor of the file. heads: rows of each head lie in llama.cpp's order (pairs of rotated dimensions side by side) and
    are put back into halves."""

    path: Path
    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    nbytes: int
    heads: int | None = None

    def rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last) of the matrix as fp32 [last - first, K]."""
        if self.heads is None:
            return self._read(first, last)
        size = self.shape[0] // self.heads  # whole heads are read
        low, high = first // size * size, -(-last // size) * size
        part = self._read(low, high).unflatten(0, (-1, size // 2, 2)).transpose(1, 2).flatten(0, 2)
        return part[first - low : last - low]

    def _read(self, first: int, last: int) -> Tensor:
        import gguf

        row = self.nbytes // self.shape[0]
        if len(self.shape) == 1 and row * self.shape[0] != self.nbytes:
            raise CheckpointError(f"{self.path}: a vector in blocks of {self.kind.name}")
        data = np.fromfile(self.path, dtype=np.uint8, count=(last - first) * row, offset=self.start + first * row)
        if len(data) != (last - first) * row:
            raise CheckpointError(f"{self.path} became shorter while it was read")
        plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
        if self.kind in plain:
            return torch.from_numpy(data.view(plain[self.kind])).reshape(last - first, *self.shape[1:])
        numbers = gguf.dequantize(data.reshape(last - first, row), self.kind)
        return torch.from_numpy(numbers).reshape(last - first, *self.shape[1:])


class GGUFFile(ForeignModel):
    """A .gguf file of the llama, mistral, qwen2 or qwen3 architecture."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise MissingExtra(f"reading {path}", "hf") from None
        try:
            reader = gguf.GGUFReader(str(path))
            self.metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
            self._tokens = {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}
            found = {t.name: Blocks(path, t.tensor_type, tuple(map(int, reversed(t.shape))), int(t.data_offset), int(t.n_bytes))
                     for t in reader.tensors}  # fmt: skip
        except OSError as problem:
            raise InputError(f"{path} cannot be read: {problem}") from None
        except Exception as problem:  # the package raises whatever its parsing runs into
            raise CheckpointError(f"{path} is not a sound .gguf file ({type(problem).__name__}: {problem})") from None
        size = path.stat().st_size
        for name, blocks in found.items():
            if not blocks.shape or 0 in blocks.shape or blocks.start + blocks.nbytes > size or blocks.nbytes % blocks.shape[0]:
                raise CheckpointError(f"{path} is not a sound .gguf file ({name})")
        self._found = found
        self.path = path
        super().__init__(path, self._table())

    def _table(self) -> dict[str, Any]:
        place, architecture = str(self.path), str(self.metadata.get("general.architecture"))
        if architecture not in FAMILY_OF:
            raise ConfigError(f"{place}: general.architecture = {shown(architecture)} is not computed from a .gguf file; there is: "
                              f"{', '.join(FAMILY_OF)}. Other families are read from their folders")  # fmt: skip
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise ConfigError(f"{place} is one of {self.metadata['split.count']} parts; join them: llama-gguf-split --merge")
        own = {name.removeprefix(architecture + "."): value for name, value in self.metadata.items() if name.startswith(architecture + ".")}
        for name, value in own.items():
            if name not in KEYS and name not in CHECKED:
                raise ConfigError(f"{place}: {architecture}.{name} = {shown(value)} is not computed")
        has = self._found
        table: dict[str, Any] = {"model_type": FAMILY_OF[architecture], "tie_word_embeddings": "output.weight" not in has}
        table.update({KEYS[name]: value for name, value in own.items() if name in KEYS})
        if "token_embd.weight" in has:
            table["vocab_size"] = has["token_embd.weight"].shape[0]
        table["rms_norm_eps"] = float(f"{table.get('rms_norm_eps', 1e-6):.6g}")  # stored in fp32
        table.setdefault("num_key_value_heads", table.get("num_attention_heads"))
        width = table.get("head_dim") or own.get("rope.dimension_count")
        if width is not None:
            table["head_dim"] = width
        for name in ("rope.dimension_count", "attention.value_length"):
            if name in own and own[name] != width:
                raise ConfigError(f"{place}: {architecture}.{name} = {own[name]} is not computed beside heads of {width}")
        if FAMILY_OF[architecture] in ("llama", "qwen3"):
            table["attention_bias"] = "blk.0.attn_q.bias" in has
        if FAMILY_OF[architecture] == "llama":
            table["mlp_bias"] = "blk.0.ffn_up.bias" in has
        if FAMILY_OF[architecture] == "mistral":
            table["sliding_window"] = None  # llama.cpp computes none
        kind = own.get("rope.scaling.type", "none")
        if kind != "none":
            length = own.get("rope.scaling.original_context_length")
            table["rope_scaling"] = {"rope_type": kind, "factor": own.get("rope.scaling.factor"), "original_max_position_embeddings": length}
        return table

    def stored(self) -> dict[str, Stored]:
        """Tensors by llama.cpp's names, unread; CheckpointError when rows do not divide into the heads."""
        found: dict[str, Stored] = {}
        permuted = {"llama": {"attn_q": self.config.num_heads, "attn_k": self.config.groups}}
        heads = permuted.get(str(self.metadata["general.architecture"]), {})
        for name, blocks in self._found.items():
            stem, _, kind = name.rpartition(".")
            parts = stem.split(".")
            if parts[0] == "blk" and len(parts) == 3 and parts[2] in INSIDE:
                count = heads.get(parts[2])
                if count is not None and blocks.shape[0] % (2 * count):
                    raise CheckpointError(f"{self.path}: {name} does not divide into {count} heads")
                found[f"model.layers.{parts[1]}.{INSIDE[parts[2]]}.{kind}"] = replace(blocks, heads=count)
            else:
                found[f"{OUTSIDE.get(stem, stem)}.{kind}"] = blocks  # an unknown one is refused under its own name
        return found

    @property
    def nbytes(self) -> int:
        return sum(blocks.nbytes for blocks in self._found.values())

    def own_tokenizer(self) -> Tokenizer:
        """From the files beside it, or made of its own list of tokens by transformers."""
        folder = self.path.parent
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.load(folder)
        instead = f"put its tokenizer.json beside it in {folder}, or give --tokenizer.name FOLDER where a verb takes it"
        if self._tokens.get("tokenizer.ggml.model", "none") == "none":
            raise InputError(f"{self.path} holds no tokenizer; {instead}")
        with tempfile.TemporaryDirectory(prefix="treadle-") as scratch:
            try:
                for name, data in self.tokenizer_files().items():
                    Path(scratch, name).write_bytes(data)
            except InputError as problem:
                self._converted(scratch, f"{problem}; {instead}")
            return Tokenizer.load(scratch)

    def tokenizer_files(self) -> dict[str, bytes]:
        """Its own tokenizer as the files of a Hugging Face folder; InputError for a kind that is not read."""
        try:
            return files_of(self._tokens, str(self.path))
        except (KeyError, IndexError, TypeError, AttributeError) as problem:
            raise InputError(f"{self.path}: the tokenizer inside is not sound ({type(problem).__name__}: {problem})") from None

    def _converted(self, scratch: str, instead: str) -> None:
        """Other kinds (SentencePiece's) as transformers reads them. Byte-level BPE of an unknown cut into words is refused:
        transformers would take one for another."""
        if self._tokens.get("tokenizer.ggml.model") == "gpt2":
            raise InputError(instead)
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise MissingExtra(f"the tokenizer inside {self.path}", "hf") from None
        try:
            found = AutoTokenizer.from_pretrained(str(self.path.parent), gguf_file=self.path.name, local_files_only=True)
            found.save_pretrained(scratch)
        except Exception as problem:  # whatever transformers runs into
            raise InputError(f"the tokenizer inside {self.path} cannot be read ({problem}); {instead}") from None
