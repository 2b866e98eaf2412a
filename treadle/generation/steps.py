"""One token for each row of a state: the forward pass that decoding repeats, on a GPU as a graph of its kernels.

For one token the kernels of a model are shorter than their launches: a GPT-2 of 124M parameters wrote 188 tokens a second on an
H200, kernel by kernel. A CUDA graph launches them all at once. It reads and writes fixed memory, so the state stays where it is,
and caches are read up to a bound (SPAN) that grows less often than the text.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from treadle.data.batch import PAD, Batch
from treadle.layers.state import State

SPAN = 256  # slots by which the part of a cache that is read grows; each such part has a graph of its own
PLAIN = 2  # steps of so many rows kernel by kernel first: what is prepared on first use is, it is seen whether the host waits for the
# device, and a server whose rows come and go at each step records nothing
WAITS = "called a synchronizing CUDA operation"  # what torch warns of then


def column(ids: Tensor, running: Sequence[int] | None = None) -> Batch:
    """Ids [B] as a batch [B, 1], without the host-side work of Batch.from_ids; all rows but those that run are padding."""
    rows = ids.shape[0]
    if running is None or len(running) == rows:
        return _batch(ids)
    doc_ids = _padding(rows, running)
    batch = _batch(ids, doc_ids.to(ids.device))
    batch.segments = tuple((1 if own == 0 else -1,) for own in doc_ids[:, 0].tolist())
    return batch


def _batch(ids: Tensor, doc_ids: Tensor | None = None) -> Batch:
    """Ids [B] and doc_ids [B, 1] as they lie on the device; on the host every row goes on."""
    return Batch(ids[:, None], doc_ids=doc_ids, segments=((1,),) * ids.shape[0], position_ids=torch.zeros_like(ids)[:, None])


def _padding(rows: int, running: Sequence[int]) -> Tensor:
    """doc_ids [B, 1] on the host: 0, and PAD where a row does not run."""
    doc_ids = torch.full((rows, 1), PAD)
    doc_ids[list(running)] = 0
    return doc_ids


def _wanted(found: Tensor, running: Sequence[int] | None) -> Tensor:
    """Of [B, ...] the rows that run, in their order."""
    return found if running is None or list(running) == list(range(found.shape[0])) else found[list(running)]


class Steps:
    """Steps of a model kernel by kernel."""

    def __init__(self, model: Any) -> None:
        self.model, self.head = model, model.heads()["lm_head"]

    def __call__(self, ids: Tensor, state: Any, running: Sequence[int] | None = None) -> tuple[Tensor, Any]:
        """ids [B] -> logits [N, V] of what follows, and the state. running: the numbers of the N rows that go on (by default all), in
        the order of their logits; the others' state stays."""
        out = self.model.hidden(column(ids, running), state)
        return self.head(_wanted(out.hidden[:, -1], running)), out.state


def steps_of(model: Any) -> Steps:
    """The way of stepping where the model is."""
    return GraphedSteps(model) if model.device.type == "cuda" else Steps(model)


@dataclasses.dataclass
class _Graph:
    replay: Callable[[], Tensor]  # -> logits [B, V]
    ids: Tensor  # [B]
    doc_ids: Tensor | None  # [B, 1], where rows may be padding


class GraphedSteps(Steps):
    """Steps as CUDA graphs, once a model has shown that it keeps its numbers on the device (H-Net does not: where chunks end is read
    on the host); else kernel by kernel."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._plain, self._form = 0, (0, 0)  # steps of a state of so many rows and slots so far
        self._refused = False
        self._graphs: dict[tuple[int, bool], _Graph] = {}
        self._held: State | None = None  # where the graphs have the state
        self._memory: list[Tensor] = []  # its tensors
        self._given: State | None = None  # what the last step returned: the same tensors

    def __call__(self, ids: Tensor, state: Any, running: Sequence[int] | None = None) -> tuple[Tensor, Any]:
        if self._refused or type(state) is not State:
            return super().__call__(ids, state, running)
        rows = ids.shape[0]
        if (form := (rows, state.max_len)) != self._form:
            self._plain, self._form = 0, form
        if self._plain < PLAIN:
            self._plain += 1
            before, batch = _fixed(state), column(ids, running)
            (logits, state), waits = watched(lambda: self._computed(batch, state))
            # Of a state that holds numbers on the host, or changes its form, a graph would repeat one step's.
            self._refused = (waits and self._plain == PLAIN) or _fixed(state) != before
            return _wanted(logits, running), state
        after = list(state.host_lengths)
        for row in range(rows) if running is None else running:
            after[row] += 1
        if max(after) > state.max_len:
            return super().__call__(ids, state, running)  # which says what is wrong
        given = self._hold(state)
        key = (min(state.max_len, -(-max(after) // SPAN) * SPAN), running is not None and len(running) < rows)
        if key not in self._graphs:
            try:
                self._graphs[key] = self._recorded(ids, *key)
            except RuntimeError as problem:  # nothing has run, so that the state is as it was
                self._refused, given.host_lengths = True, list(state.host_lengths)
                warnings.warn(f"a step of {type(self.model).__name__} does not become a CUDA graph, so decoding goes on kernel by kernel: {problem}",
                              stacklevel=2)  # fmt: skip
                return super().__call__(ids, given, running)
        graph = self._graphs[key]
        graph.ids.copy_(ids)
        if graph.doc_ids is not None and running is not None:
            graph.doc_ids.copy_(_padding(rows, running))
        logits = graph.replay().clone()  # the next replay writes over them
        given.host_lengths = after
        return _wanted(logits, running), given

    def _hold(self, state: State) -> State:
        """Brings the state to where the graphs have it -> a state of those tensors. One of another form begins anew."""
        tensors = _tensors(state)
        if state is self._given and all(mine is new for mine, new in zip(self._memory, tensors)):
            return state
        if self._held is None or _fixed(state) != _fixed(self._held):
            self._graphs.clear()
            self._held, self._memory = _copied(state), tensors
        for mine, new in zip(self._memory, tensors):
            if mine.data_ptr() != new.data_ptr():
                mine.copy_(new)
        self._given = given = _copied(self._held)
        return given

    def _computed(self, batch: Batch, state: State) -> tuple[Tensor, State]:
        """Logits [B, V] of all rows, and the state after them."""
        out = self.model.hidden(batch, state)
        return self.head(out.hidden[:, -1]), out.state

    def _recorded(self, ids: Tensor, used: int, padded: bool) -> _Graph:
        own, rows = ids.clone(), ids.shape[0]
        doc_ids = torch.zeros_like(own)[:, None] if padded else None

        def work() -> Tensor:
            state = _copied(self._held)
            state.host_lengths = [used - 1] * rows  # so that caches are read up to `used`
            logits, after = self._computed(_batch(own, doc_ids), state)
            for mine, new in zip(self._memory, _tensors(after)):
                if mine.data_ptr() != new.data_ptr():
                    mine.copy_(new)
            return logits

        return _Graph(record(work), own, doc_ids)


def record(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The kernels that `work` launches, to be launched again all at once into the tensor (of any shape) that it returns; nothing runs now."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")  # other threads may go on allocating
        try:
            result = work()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def watched(work: Callable[[], Any]) -> tuple[Any, bool]:
    """What `work` returns, and whether the host waited for the GPU in it, which a graph cannot do."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("ignore")  # that the mode is young
        torch.cuda.set_sync_debug_mode("warn")
        warnings.simplefilter("always")
        try:
            found = work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in said:
        if WAITS not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return found, any(WAITS in str(warning.message) for warning in said)


# ---- the tensors of a state ----


def _parts(value: Any) -> list[Any]:
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, (list, tuple)) else []


def _tensors(value: Any) -> list[Tensor]:
    """All tensors of a state, in order."""
    return [value] if isinstance(value, Tensor) else [found for part in _parts(value) for found in _tensors(part)]


def _fixed(state: State) -> Any:
    """All that a step must not change: shapes and types of the tensors, and what is kept on the host but for the rows' lengths."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.shape, value.dtype
        parts = _parts(value)
        return [type(value).__name__, *map(of, parts)] if parts or dataclasses.is_dataclass(value) else value

    return state.max_len, of(state.lengths), of(state.layers)


def _copied(value: Any) -> Any:
    """The same tensors in lists and dataclasses of their own, so that what is assigned to one is not seen in the other."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copied, value))
    if isinstance(value, dict):
        return {name: _copied(part) for name, part in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    made = copy.copy(value)
    for field in dataclasses.fields(value):
        object.__setattr__(made, field.name, _copied(getattr(value, field.name)))
    return made
