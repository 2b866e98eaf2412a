"""Cached decoding over anything that keeps the model contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from treadle.data.batch import PAD, Batch
from treadle.errors import ConfigError
from treadle.generation.sampling import Sampling, next_ids
from treadle.text.base import Tokenizer


class DecodableModel(Protocol):
    """What generation needs of a model; `models/base.py` documents each of these."""

    training: bool

    @property
    def vocab_size(self) -> int: ...

    def heads(self) -> Any:
        """lm_head among them, by name."""

    @property
    def device(self) -> torch.device: ...

    def hidden(self, batch: Batch, state: Any = None) -> Any:
        """An output with `hidden` [B, T, D] and `state`."""

    def new_state(self, batch_size: int, max_len: int) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...


def generate(
    model: DecodableModel,
    input_ids: Any,
    max_new_tokens: int = 100,
    *,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 0.9,
    repetition_penalty: float = 1.0,
    eos_id: int | None = None,
    attention_mask: Any = None,
    seed: int = 0,
    on_ids: Callable[[Tensor], bool | None] | None = None,
    extras: dict[str, Any] | None = None,
) -> Tensor:
    """Prompt ids [B, T] or [T] -> prompt + new ids [B, T + N], int64.

    No stop unless eos_id is given: then rows end after it and are filled with it. Positions with attention_mask 0 are
    padding. extras: what else the model reads, by name and with the rows first, as in Batch; it comes with the prompt
    alone, so that the model keeps it in its state. `on_ids` sees each new column [B] and stops the generation by
    returning True. Raises ConfigError for an empty prompt, ids outside the vocabulary, or settings out of range.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    ids = torch.as_tensor(input_ids, dtype=torch.int64)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise ConfigError("the prompt is empty; give at least one token")
    vocabulary = model.vocab_size
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ConfigError(f"the prompt has ids outside 0..{vocabulary - 1}; is this the model's own tokenizer?")
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens = {max_new_tokens}: must be >= 0")
    columns = list(_columns(model, ids, max_new_tokens, sampling, eos_id, attention_mask, seed, on_ids, extras))
    return torch.cat([ids, *(column[:, None].cpu() for column in columns)], dim=1)


def _columns(
    model: DecodableModel, ids: Tensor, count: int, sampling: Sampling, eos_id: int | None, attention_mask: Any, seed: int,
    on_ids: Callable[[Tensor], bool | None] | None, extras: dict[str, Any] | None,
) -> Iterator[Tensor]:  # fmt: skip
    """The new columns, one at a time."""
    if count == 0:
        return
    doc_ids = None
    if attention_mask is not None:
        mask = torch.as_tensor(attention_mask).reshape(ids.shape)
        doc_ids = torch.where(mask != 0, 0, PAD)
    rows = ids.shape[0]
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    head = model.heads()["lm_head"]
    model.eval()
    try:
        with torch.inference_mode():
            state = model.new_state(rows, ids.shape[1] + count)
            batch = Batch.from_ids(ids, doc_ids=doc_ids, extras=extras).to(model.device)
            seen = torch.zeros(rows, model.vocab_size, dtype=torch.bool, device=model.device)
            token_mask = batch.token_mask
            seen.scatter_(1, batch.input_ids, token_mask)
            if doc_ids is not None:  # scatter has no order: padding must not undo a token
                for row, column in token_mask.nonzero().tolist():
                    seen[row, batch.input_ids[row, column]] = True
            out = model.hidden(batch, state)
            # Only the last token of each row is read: the head never sees the rest of the prompt.
            last = _last_positions(out.hidden, token_mask)
            finished = torch.zeros(rows, dtype=torch.bool, device=model.device)
            for left in range(count - 1, -1, -1):
                new = next_ids(head(last), seen, sampling, generator)
                if eos_id is not None:
                    new = torch.where(finished, eos_id, new)
                    finished = finished | (new == eos_id)
                yield new
                stop = on_ids(new) if on_ids is not None else False
                if stop or left == 0 or (eos_id is not None and bool(finished.all())):
                    return
                seen.scatter_(1, new[:, None], True)
                out = model.hidden(_one_column(new), out.state)
                last = out.hidden[:, -1]
    finally:
        model.train(was_training)


def _last_positions(hidden: Tensor, token_mask: Tensor) -> Tensor:
    length = hidden.shape[1]
    index = torch.arange(length, device=hidden.device)
    at = torch.where(token_mask, index, -1).amax(1).clamp_min(0)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), at]


def _one_column(ids: Tensor) -> Batch:
    """Ids [B] as a batch [B, 1], without the host-side work of Batch.from_ids."""
    rows = ids.shape[0]
    return Batch(ids[:, None], segments=((1,),) * rows, position_ids=torch.zeros_like(ids)[:, None])


def generate_text(
    model: DecodableModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 100,
    *,
    on_text: Callable[[str], None] | None = None,
    stop: str | None = None,
    use_eos: bool = True,
    **options: Any,
) -> str:
    """The continuation of a prompt as text, without the prompt; `on_text` gets it piece by piece.

    Ends at the end-of-document token, after max_new_tokens, or before the text `stop`. A character cut at the end is
    left out.
    """
    ids = tokenizer.prompt_ids(prompt)
    fresh: list[int] = []
    shown = ""

    def on_ids(column: Tensor) -> bool:
        nonlocal shown
        fresh.append(int(column[0]))
        text = _complete(tokenizer.decode(fresh))
        ended = stop is not None and stop in text
        if ended:
            text = text[: text.index(stop)]  # type: ignore[arg-type]
        if on_text is not None and len(text) > len(shown):
            on_text(text[len(shown) :])
        shown = text
        return ended

    eos = tokenizer.eos_id if use_eos else None
    generate(model, ids, max_new_tokens, eos_id=eos, on_ids=on_ids, **options)
    return shown


def _complete(text: str) -> str:
    """Without the replacement characters of a character that is still being written."""
    return text.rstrip("\ufffd")
