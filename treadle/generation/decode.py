"""Cached decoding over anything that keeps the model contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from treadle.data.batch import PAD, Batch
from treadle.errors import ConfigError
from treadle.generation.decoding import DecodableModel
from treadle.generation.mode import evaluating
from treadle.generation.reading import Reading, reading
from treadle.generation.sampling import Sampling, generator_of, next_ids
from treadle.generation.speculation import Draft, NGrams, Proposer, speculated
from treadle.generation.text_stream import TextStream
from treadle.text.base import Tokenizer


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
    weights: str | None = None,
    speculative: str | None = None,
    draft: DecodableModel | None = None,
    statistics: dict[str, int] | None = None,
) -> Tensor:
    """Prompt ids [B, T] or [T] -> prompt + new ids [B, T + N], int64. Prompts of different lengths, as a list of lists, get
    padding (0) on the left; each goes on as it would alone.

    No stop unless eos_id is given: then rows end after it and are filled with it. Positions with attention_mask 0 are
    padding. extras: what else the model reads, by name and with the rows first, as in Batch; it comes with the prompt
    alone, so that the model keeps it in its state. `on_ids` sees each new column [B] and stops the generation by
    returning True. weights: fp32, bf16, int8 or int4, what the linear layers' weights are read in.
    speculative = "ngram" (what followed the last tokens before) or draft (a smaller model with the same tokens): several tokens
    of a single row are read at once, with the same outcome (generation/speculation.py); statistics gets the sums of steps,
    tokens proposed and kept. Raises ConfigError for an empty prompt, ids outside the vocabulary, or settings out of range.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    if attention_mask is None and _is_ragged(input_ids):
        input_ids, attention_mask = _padded(input_ids)
    ids = torch.as_tensor(input_ids, dtype=torch.int64)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise ConfigError("the prompt is empty; give at least one token")
    vocabulary = model.vocab_size
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ConfigError(f"the prompt has ids outside 0..{vocabulary - 1}; is this the model's own tokenizer?")
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens = {max_new_tokens}: must be >= 0")
    _check_positions(model, ids, attention_mask, max_new_tokens)
    _check_speculation(model, ids, speculative, draft, extras)
    with evaluating(model) as was_training:
        ready = reading(model, weights, keep=not was_training) if max_new_tokens else Reading(model, "fp32", {})
        with torch.inference_mode():
            if speculative is None and draft is None:
                columns = list(_columns(ready, ids, max_new_tokens, sampling, eos_id, attention_mask, seed, on_ids, extras))
            else:
                read = ids if attention_mask is None else ids[torch.as_tensor(attention_mask).reshape(ids.shape) != 0][None]
                columns = _speculated(ready, read, max_new_tokens, sampling, eos_id, seed, on_ids, speculative, draft, weights, statistics)
    return torch.cat([ids, *(column[:, None].to(ids.device) for column in columns)], dim=1)


def _is_ragged(input_ids: Any) -> bool:
    """Rows of different lengths, none of them empty (which is an error of its own)."""
    if not isinstance(input_ids, (list, tuple)) or not input_ids or not all(hasattr(row, "__len__") for row in input_ids):
        return False
    lengths = {len(row) for row in input_ids}
    return len(lengths) > 1 and 0 not in lengths


def _padded(rows: Any) -> tuple[Tensor, Tensor]:
    """Ids [B, T] with 0 before the shorter rows, and the mask of what is real."""
    longest = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.int64), torch.zeros(len(rows), longest, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = torch.as_tensor(row, dtype=torch.int64)
        mask[number, longest - len(row) :] = 1
    return ids, mask


def _columns(
    ready: Reading, ids: Tensor, count: int, sampling: Sampling, eos_id: int | None, attention_mask: Any, seed: int,
    on_ids: Callable[[Tensor], bool | None] | None, extras: dict[str, Any] | None,
) -> Iterator[Tensor]:  # fmt: skip
    """The new columns, one at a time."""
    if count == 0:
        return
    model, rows = ready.model, ids.shape[0]
    doc_ids = None
    if attention_mask is not None:
        mask = torch.as_tensor(attention_mask).reshape(ids.shape)
        doc_ids = torch.where(mask != 0, 0, PAD)
    generator = generator_of(seed)
    decoding = ready.start(rows, ids.shape[1] + count, ordinary=extras is not None)
    batch = Batch.from_ids(ids, doc_ids=doc_ids, extras=extras).to(model.device)
    seen = _seen(batch, model.vocab_size) if sampling.repetition_penalty != 1 else None
    logits = decoding.prompt(batch)
    finished = torch.zeros(rows, dtype=torch.bool, device=model.device)
    for left in range(count - 1, -1, -1):
        new = next_ids(logits, seen, sampling, generator)
        if eos_id is not None:
            new = torch.where(finished, eos_id, new)
            finished = finished | (new == eos_id)
        yield new
        stop = on_ids(new) if on_ids is not None else False
        if stop or left == 0 or (eos_id is not None and bool(finished.all())):
            return
        if seen is not None:
            seen.scatter_(1, new[:, None], True)
        logits = decoding.step(new, None if eos_id is None else (~finished).nonzero()[:, 0])


def _check_positions(model: DecodableModel, ids: Tensor, attention_mask: Any, count: int) -> None:
    """ConfigError, before the first token, for more tokens than the model has positions; the last new one is never read."""
    most = getattr(model, "longest_row", None)
    longest = ids.shape[1] if attention_mask is None else int((torch.as_tensor(attention_mask).reshape(ids.shape) != 0).sum(1).max())
    if most is None or count == 0 or longest + count - 1 <= most:
        return
    what = f"the model has positions for {most} tokens (max_position_embeddings), the prompt has {longest}"
    if longest > most:
        raise ConfigError(f"{what}: give a shorter prompt")
    raise ConfigError(f"{what} and {count} new ones are asked for: ask for at most {most - longest + 1} (--max-new-tokens), or give a shorter prompt")


def _check_speculation(model: DecodableModel, ids: Tensor, speculative: str | None, draft: DecodableModel | None, extras: Any) -> None:
    if speculative is None and draft is None:
        return
    if speculative not in (None, "ngram"):
        raise ConfigError(f"speculative = {speculative!r}: use ngram, or give a smaller model as draft")
    if speculative is not None and draft is not None:
        raise ConfigError("speculative and draft exclude one another; keep one")
    if ids.shape[0] != 1 or extras is not None:
        raise ConfigError(f"speculation reads one row of tokens at a time, not {ids.shape[0]}; leave it out, or give one prompt")
    if draft is not None and draft.vocab_size != model.vocab_size:
        raise ConfigError(f"the draft has {draft.vocab_size} tokens, the model {model.vocab_size}; a draft has the same tokenizer")


def _check_length(model: Any, longest: int) -> None:
    """ConfigError where several tokens at once have other angles than one after another, so that the outcome would change."""
    config: Any = getattr(model, "config", None)
    scaling = getattr(config, "rope_scaling", None)
    if scaling is not None and scaling["rope_type"] == "dynamic" and longest > config.max_position_embeddings:
        raise ConfigError(f"speculation would change what is written: with rope_type dynamic, the angles beyond max_position_embeddings = "
                          f"{config.max_position_embeddings} depend on how many tokens are read at once; leave it out, or keep prompt and "
                          f"new tokens ({longest}) within it")  # fmt: skip


def _speculated(
    ready: Reading, ids: Tensor, count: int, sampling: Sampling, eos_id: int | None, seed: int,
    on_ids: Callable[[Tensor], bool | None] | None, speculative: str | None, draft: DecodableModel | None, weights: str | None,
    statistics: dict[str, int] | None,
) -> list[Tensor]:  # fmt: skip
    """The new columns of a single row."""
    if count == 0:
        return []
    generator = generator_of(seed)
    longest = ids.shape[1] + count
    _check_length(ready.model, longest)
    with ExitStack() as inside:
        proposer: Proposer = NGrams()
        if draft is not None:
            most = getattr(draft, "longest_row", None)
            if most is not None and longest - 2 > most:  # it never reads the last token, nor the last one it proposes
                raise ConfigError(f"the draft model has positions for {most} tokens, prompt and new tokens are {longest}; ask for fewer new tokens, "
                                  "or take another draft")  # fmt: skip
            was_training = inside.enter_context(evaluating(draft))
            proposer = Draft(reading(draft, weights, keep=not was_training).start(1, longest), sampling, generator)
        columns = []
        for token in speculated(ready.start(1, longest), ids, count, sampling, generator, proposer, statistics):
            columns.append(torch.tensor([token]))
            if (on_ids is not None and on_ids(columns[-1])) or token == eos_id:
                break
    return columns


def _seen(batch: Batch, vocabulary: int) -> Tensor:
    """bool [B, V]: the tokens of each prompt."""
    token_mask = batch.token_mask
    seen = torch.zeros(batch.shape[0], vocabulary, dtype=torch.bool, device=token_mask.device)
    seen.scatter_(1, batch.input_ids, token_mask)
    if batch.doc_ids is not None:  # scatter has no order: padding must not undo a token
        for row, column in token_mask.nonzero().tolist():
            seen[row, batch.input_ids[row, column]] = True
    return seen


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

    Ends at the end-of-document token, after max_new_tokens, before the text `stop`, or where the model has no position left. A
    character cut at the end is left out. ConfigError for a prompt that the model has no positions for.
    """
    ids = tokenizer.prompt_ids(prompt)
    stream = TextStream(tokenizer, ids, () if stop is None else (stop,))
    tell = on_text or (lambda text: None)
    most = getattr(model, "longest_row", None)
    if most is not None and len(ids) <= most:
        max_new_tokens = min(max_new_tokens, most - len(ids) + 1)  # the last token is written and never read

    def on_ids(column: Tensor) -> bool:
        if fresh := stream.push(int(column[0])):
            tell(fresh)
        return stream.stopped

    eos = tokenizer.eos_id if use_eos else None
    generate(model, ids, max_new_tokens, eos_id=eos, on_ids=on_ids, **options)
    if not stream.stopped and (held := stream.finish()):
        tell(held)
    return stream.text
