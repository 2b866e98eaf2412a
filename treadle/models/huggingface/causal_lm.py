"""How transformers meets a model of treadle's: configuration, causal model and cache.

treadle itself never imports this module. Its text, with the model's class for `Architecture`, is the end of the modeling file that an
export writes (modeling_file.py); there it runs with torch and transformers alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from treadle.data.batch import PAD, Batch
from treadle.errors import ConfigError
from treadle.layers.state import State
from treadle.models.base import Model as Architecture


class TreadleConfig(PretrainedConfig):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """config.json. treadle: the keys of the model, under the names that treadle gives them."""

    model_type = f"treadle_{Architecture.arch}"

    def __init__(self, treadle: Mapping[str, Any] | None = None, vocab_size: int = 0, **others: Any) -> None:
        self.treadle, self.vocab_size = dict(treadle or {}), vocab_size
        super().__init__(**others)

    def keys(self) -> Any:
        """The keys as the model takes them."""
        return Architecture.Config(**{name: value for name, value in self.treadle.items() if name != "arch"})


class TreadleCache:
    """What a model remembers of its rows while it generates; `state` grows where it has to."""

    is_linear, is_compileable, is_croppable = (False,), False, False

    def __init__(self) -> None:
        self.state: State | None = None
        self.seen = 0  # columns of input_ids, padding too

    def ready(self, model: Architecture, rows: int, length: int) -> State:
        """A state that `length` more tokens fit into."""
        used = 0 if self.state is None else self.state.used
        if self.state is None or used + length > self.state.max_len:
            size = used + length + (64 if self.state is None else self.state.max_len)
            larger = model.new_state(rows, size)
            if self.state is not None:
                larger.put(range(rows), self.state)
            self.state = larger
        return self.state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen; every layer has seen as many."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        if self.state is not None:
            self.state = self.state.select(beam_idx.cpu())

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, side by side."""
        if self.state is not None:
            self.state = self.state.select(torch.arange(len(self.state.host_lengths)).repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """Raises NotImplementedError: a recurrent state cannot go back."""
        raise NotImplementedError("this model's memory cannot be taken back by some tokens; generate without an assistant")


# transformers 5 calls it `cache` from some version on.
CACHE = "cache" if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"


class TreadleForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """The model for `AutoModelForCausalLM`, with `generate`."""

    config_class = TreadleConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _is_stateful = True

    def __init__(self, config: TreadleConfig) -> None:
        super().__init__(config)
        self.model = Architecture(config.keys())  # type: ignore[abstract]
        if config.tie_word_embeddings:
            self._tied_weights_keys = {"model.head.weight": "model.embedding.weight"}
        self.post_init()  # type: ignore[no-untyped-call, unused-ignore]

    @classmethod
    def _supports_default_dynamic_cache(cls, *_: Any) -> bool:
        return False  # the cache is made by the first pass

    def get_input_embeddings(self) -> Any:
        return self.model.embedding

    def set_input_embeddings(self, value: Any) -> None:
        self.model.embedding = value
        self.model.tie()

    def get_output_embeddings(self) -> Any:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.model.head = new_embeddings

    def tie_weights(self, *args: Any, **keys: Any) -> None:
        self.model.tie()
        if self.config.tie_word_embeddings:
            super().tie_weights(*args, **keys)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Where no file is read: as treadle starts a model, but for the random numbers."""
        for name, parameter in self.model.named_parameters():
            if not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False):
                rule = self.model.initial(name, parameter)
                if isinstance(rule, Tensor):
                    parameter.copy_(rule)
                elif isinstance(rule, str):
                    parameter.fill_(1.0 if rule == "ones" else 0.0)
                else:
                    parameter.normal_(0.0, rule)
        self.tie_weights()

    def _init_weights(self, module: Any) -> None:
        """`init_weights` knows parameters by their names."""

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        self._checkpoint(True)

    def gradient_checkpointing_disable(self) -> None:
        self._checkpoint(False)

    def _checkpoint(self, on: bool) -> None:
        for block in self.model.blocks():
            block.gradient_checkpointing = on  # type: ignore[assignment, unused-ignore]

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None, cache: Any = None,
        use_cache: bool | None = None, logits_to_keep: int | Tensor = 0, return_dict: bool | None = None,
        num_items_in_batch: Any = None, inputs_embeds: Tensor | None = None, **others: Any,
    ) -> Any:  # fmt: skip
        """input_ids [B, T] -> logits [B, T, V]. attention_mask [B, T] or, with a cache, of all columns so far: 0 is padding, on either
        side; labels [B, T], -100 where nothing is scored, shifted here. ConfigError for inputs_embeds and for a mask of
        another shape."""
        if input_ids is None or inputs_embeds is not None:
            raise ConfigError("this model reads input_ids; inputs_embeds are not taken")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ConfigError(f"attention_mask is {list(attention_mask.shape)}; give [B, T]")
        held = cache if cache is not None else others.get("past_key_values")  # as transformers called it before
        if held is None and use_cache:
            held = TreadleCache()
        rows, length = input_ids.shape
        documents = None
        if attention_mask is not None:
            real = attention_mask[:, -length:].bool()
            documents = None if bool(real.all()) else torch.where(real, 0, PAD)
        batch = Batch.from_ids(input_ids, documents)
        out = self.model(batch, None if held is None else held.ready(self.model, rows, length))
        if held is not None:
            held.state = out.state
            held.seen += length
        logits = out.logits
        loss = None if labels is None else self._loss(logits, labels, out.losses, batch, num_items_in_batch)
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            logits = logits[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else logits[:, logits_to_keep]
        found = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: held})
        return found.to_tuple() if return_dict is False else found

    def _loss(self, logits: Tensor, labels: Tensor, losses: Mapping[str, tuple[Tensor, str]], batch: Batch, items: Any) -> Tensor:
        """Cross-entropy of the next tokens; while training with what the model adds to it, a token."""
        wanted = labels[:, 1:].to(logits.device)
        total = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted.flatten(), reduction="sum")
        loss = total / (items if items is not None else (wanted != -100).sum().clamp_min(1))
        if self.training:
            for value, unit in losses.values():
                loss = loss + value / max(1, batch.counts[unit])
        return loss

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, cache: Any = None, attention_mask: Tensor | None = None, use_cache: bool | None = None,
        inputs_embeds: Any = None, **others: Any,
    ) -> dict[str, Any]:  # fmt: skip
        held = cache if cache is not None else others.get("past_key_values")
        if held is not None and (attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]):
            input_ids = input_ids[:, held.seen :]  # all were given, and those before are remembered
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": use_cache, "inputs_embeds": inputs_embeds}
        return {**given, CACHE: held}
