"""Held-out text token by token: what each cost the model, and where it begins its chunks. A small pass over a few rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from treadle.data.base import Dataset
from treadle.data.batch import IGNORE, Batch
from treadle.data.dataset import TokenDataset
from treadle.evaluation.report import held_out, objective_of
from treadle.models.base import LM_HEAD
from treadle.models.pretrained import load_run
from treadle.text.base import Tokenizer

MOST_TOKENS = 768  # of a passage
PASSAGES = 3
END = "\u220e\n"  # how a token without text is shown, as the end of a document or of a turn


@dataclass
class Passages:
    """passages: {"title", "tokens": pieces of text, "losses": nats (None for what was given), "chunks", "per_chunk"}; note: why there
    are none."""

    passages: list[dict[str, Any]]
    note: str | None = None


def read_passages(run: str, device: str = "auto") -> Passages:
    """A few rows spread over the run's held-out text, read by its newest checkpoint. TreadleError as load_run and the data
    raise."""
    loaded = load_run(run, device, warn=lambda text: None)
    model, tokenizer = loaded.model, loaded.tokenizer
    if tokenizer is None or LM_HEAD not in model.heads():
        return Passages([], f"This run's data is no text that is predicted token by token ({model.arch}), so none is coloured.")
    split = held_out(loaded.config, tokenizer, None)["validation"]
    if not isinstance(split, TokenDataset):
        return Passages([], "This run's held-out data is no text, so none is coloured.")
    objective_of(loaded.config)  # code of the run's own is refused here where it is not trusted
    return Passages([_passage(model, tokenizer, batch, number) for number, batch in enumerate(_rows(split))])


def _rows(data: Dataset) -> list[Batch]:
    rows = data.in_sequence(1, PASSAGES)
    return [rows[number] for number in range(min(PASSAGES, len(rows)))]


def _passage(model: Any, tokenizer: Tokenizer, batch: Batch, number: int) -> dict[str, Any]:
    ids, losses = token_losses(model, batch)
    ids, losses = ids[:MOST_TOKENS], losses[:MOST_TOKENS]
    pieces, of_piece = pieces_of(tokenizer, ids)
    cost: list[float | None] = [None] * len(pieces)
    for loss, piece in zip(losses, of_piece):
        if loss is not None:
            cost[piece] = round((cost[piece] or 0.0) + loss, 3)
    found: dict[str, Any] = {"title": f"Passage {number + 1}", "tokens": pieces, "losses": cost}
    if hasattr(model, "boundaries"):
        with torch.inference_mode():
            marks = model.boundaries(Batch.from_ids(torch.tensor([ids]).to(model.device)))
        stages = [stage[0, : len(ids)].nonzero()[:, 0].tolist() for stage in marks]
        found["chunks"] = [sorted({of_piece[start] for start in starts}) for starts in stages]
        found["per_chunk"] = [round(len(ids) / max(1, len(starts)), 2) for starts in stages]
    return found


def token_losses(model: Any, batch: Batch) -> tuple[list[int], list[float | None]]:
    """Of the first row of a batch: its tokens with the last label, and the nats of each (None for those that are given: the
    first of a document, prompts, what is not learnt)."""
    batch = batch.to(model.device)
    assert batch.labels is not None
    with torch.inference_mode():
        out = model.hidden(batch)
        logits = model.heads()[LM_HEAD](out.hidden[0]).float()
        labels = batch.labels[0]
        nats = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    ids, costs = batch.input_ids[0].tolist(), [None, *nats.tolist()]
    known = [False, *(labels != IGNORE).tolist()]
    if known[-1]:  # the token after the row
        ids.append(int(labels[-1]))
    if batch.doc_ids is not None:  # padding ends the row
        length = int((batch.doc_ids[0] >= 0).sum())
        ids = ids[: length + 1] if known[-1] and length == len(ids) - 1 else ids[:length]
    return ids, [cost if kept else None for cost, kept in zip(costs, known)][: len(ids)]


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[str], list[int]]:
    """(pieces of text, for each token the piece that it belongs to). Tokens that end inside a character share the piece that
    completes it."""
    pieces: list[str] = []
    of_piece: list[int] = []
    begun = 0  # the first token that no piece has shown
    for stop in range(1, len(ids) + 1):
        of_piece.append(len(pieces))
        # From one token before, since some tokenizers leave out the space of a text's first word.
        lead = tokenizer.decode(ids[begun - 1 : begun]) if begun else ""
        text = tokenizer.decode(ids[max(0, begun - 1) : stop])[len(lead) :]
        if not text and begun == stop - 1:
            text = END  # a special token has no text
        elif (text.endswith("\ufffd") and stop - begun < 4) or not text:
            continue
        pieces.append(text)
        begun = stop
    if len(pieces) in of_piece:
        pieces.append("")
    return pieces, of_piece
