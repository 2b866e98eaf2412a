"""Continuous batching: requests of any lengths, coming and going at any time, share a model's forward passes.

A thread of its own reads prompts, a bounded number of tokens at a time, and between those decodes all running rows together. What
a request gets depends on its own settings and seed alone, not on which requests run beside it.
"""

from __future__ import annotations

import atexit
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from treadle.errors import ConfigError, TreadleError
from treadle.generation.choosing import Chooser, Token
from treadle.generation.reading import lasting
from treadle.generation.sampling import Sampling, check_seed
from treadle.generation.slots import Place, Slots, slots_of

__all__ = ["Engine", "EngineStopped", "QueueFull", "Request", "Ticket", "Token"]

PROMPT_TOKENS = 256  # of all prompts that are read between two steps of decoding: what running rows may wait for
LONGEST_WAIT = 60.0  # seconds that a client is told to wait at most
AT_EXIT = 5.0  # seconds that the interpreter waits for a step to end when it leaves


class QueueFull(TreadleError):
    """As many requests wait as may; retry_after: seconds after which there may be room."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after:.0f} seconds")
        self.retry_after = retry_after


class EngineStopped(TreadleError):
    """No new requests are taken: the engine is stopping."""

    def __init__(self) -> None:
        super().__init__("no new requests are taken: the engine is stopping")


@dataclass
class Request:
    """What is to be written, and who hears of it.

    logprobs: how many of the likeliest tokens to report beside each token (0: the token's own log-probability alone, None: none).
    logit_bias: what is added to tokens' logits before one is drawn. extras: what else the model reads with the prompt, [1, ...].
    on_token hears of each token but one of stop_ids, and ends the row by returning True; on_end hears once of the end: "stop",
    "length", "cancelled" or "error: ...". Both are called in the engine's thread, so they must be quick.
    """

    prompt_ids: list[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    on_token: Callable[[Token], bool | None] = lambda token: None
    on_end: Callable[[str], None] = lambda reason: None
    extras: dict[str, Tensor] = field(default_factory=dict)


class Ticket:
    """A request that was submitted."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.request, self._engine = request, engine
        self.cancelled = False

    def cancel(self) -> None:
        """Its row is free at the next step, wherever the request is; a request that has ended stays as it is."""
        self._engine._cancel(self)


@dataclass(eq=False)
class _Row:
    """A request that has a place."""

    ticket: Ticket
    request: Request
    chooser: Chooser
    place: Place | None = None
    read: int = 0  # tokens of the prompt
    made: int = 0
    last: int = -1


class Engine:
    """A model that answers many requests at once: as it is now, where it is laid out for reading (generation/reading.py, `lasting`), whatever
    becomes of its weights; else as it is at each step."""

    def __init__(
        self, model: Any, *, rows: int = 16, max_len: int = 2048, weights: str | None = None, queue: int = 256,
        prompt_tokens: int = PROMPT_TOKENS,
    ) -> None:  # fmt: skip
        """rows: how many requests run at once; max_len: tokens of a prompt and its continuation; weights: as `generate`'s; queue:
        how many requests may wait; prompt_tokens: how many tokens of prompts are read between two steps. ConfigError for
        numbers that cannot be."""
        for name, value in (("rows", rows), ("max_len", max_len), ("queue", queue), ("prompt_tokens", prompt_tokens)):
            if value < 1:
                raise ConfigError(f"{name} = {value}: must be at least 1")
        if not model.capabilities.decodes:
            raise ConfigError(f"the model {model.arch} does not decode, so it cannot be served")
        self.vocabulary = model.vocab_size
        self.max_len, self.limit_reason = _longest(model, max_len)
        self.rows, self.queue, self.prompt_tokens = rows, queue, prompt_tokens
        model.eval()
        self._model, self._weights = model, weights
        self._ready = lasting(model, weights)
        with torch.inference_mode():
            self._slots: Slots = slots_of(self._ready, rows, self.max_len)
        self._wake = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._gone: list[Ticket] = []  # cancelled while they waited
        self._rows: list[_Row] = []
        self._stopping, self._finish = False, True
        self._thread: threading.Thread | None = None
        self._tokens, self._prompts, self._busy = 0, 0, 0.0

    # ---- from any thread ----

    def submit(self, request: Request) -> Ticket:
        """Takes a request; QueueFull where as many wait as may, ConfigError for what can never run."""
        self._check(request)
        ticket = Ticket(self, request)
        with self._wake:
            if self._stopping:
                raise EngineStopped
            if len(self._waiting) >= self.queue:
                raise QueueFull(len(self._waiting), self._retry_after())
            self._waiting.append(ticket)
            self._wake.notify_all()
        return ticket

    def start(self) -> None:
        """Begins to work on what was and will be submitted."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
            self._thread.start()
            atexit.register(_leave, weakref.ref(self))

    def stop(self, finish: bool = True, timeout: float | None = None) -> bool:
        """Takes no new requests and ends: after those that run and wait, or (finish False) at the next step, which cancels them. ->
        whether it has ended within `timeout` seconds."""
        with self._wake:
            self._stopping, self._finish = True, finish and self._finish
            self._wake.notify_all()
        if self._thread is None:
            self._cancel_all()
            return True
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def stats(self) -> dict[str, Any]:
        """running and waiting requests; generated_tokens and prompt_tokens so far, and tokens_per_second of the time in which there
        was work; state_bytes of the rows that run; rows and max_len, their bounds."""
        with self._wake:
            running, waiting = len(self._rows), len(self._waiting)
        return {
            "running": running, "waiting": waiting, "rows": self.rows, "max_len": self.max_len,
            "generated_tokens": self._tokens, "prompt_tokens": self._prompts,
            "tokens_per_second": self._tokens / self._busy if self._busy else 0.0, "state_bytes": self._slots.nbytes,
        }  # fmt: skip

    def _check(self, request: Request) -> None:
        ids, count = request.prompt_ids, request.max_new_tokens
        if not ids:
            raise ConfigError("the prompt is empty; give at least one token")
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            raise ConfigError(f"the prompt has ids outside 0..{self.vocabulary - 1}; is this the model's own tokenizer?")
        if count < 1:
            raise ConfigError(f"max_new_tokens = {count}: must be >= 1")
        if len(ids) + count > self.max_len:
            raise ConfigError(f"the prompt has {len(ids)} tokens and {count} new ones are asked for, together {len(ids) + count}; "
                              f"{self.limit_reason} {self.max_len}")  # fmt: skip
        if request.logprobs is not None and not 0 <= request.logprobs <= self.vocabulary:
            raise ConfigError(f"logprobs = {request.logprobs}: must be between 0 and {self.vocabulary}")
        for token, bias in request.logit_bias.items():
            if not 0 <= token < self.vocabulary:
                raise ConfigError(f"logit_bias names token {token}; the model has 0..{self.vocabulary - 1}")
            if math.isnan(bias) or bias == math.inf:
                raise ConfigError(f"logit_bias of token {token} is {bias}; give a number")
        check_seed(request.seed)

    def _retry_after(self) -> float:
        """Seconds until one of the rows should have ended, by the speed so far."""
        speed = self._tokens / self._busy if self._busy else 100.0
        left = sorted(row.request.max_new_tokens - row.made for row in list(self._rows))
        return min(LONGEST_WAIT, max(1.0, (left[0] if left else 1) * len(left) / speed))

    def _cancel(self, ticket: Ticket) -> None:
        with self._wake:
            ticket.cancelled = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._gone.append(ticket)
            self._wake.notify_all()

    # ---- the engine's own thread ----

    def _work(self) -> None:
        try:
            with torch.inference_mode():
                while self._next():
                    began = time.perf_counter()
                    try:
                        self._turn()
                    except Exception as problem:  # of the engine's own: who waits hears of it, and the next request finds it working
                        self._start_anew(problem)
                    self._busy += time.perf_counter() - began
        finally:  # also where starting anew fails, for want of memory say: nobody waits for a thread that is gone
            with self._wake:
                self._stopping = True
            self._cancel_all()

    def _turn(self) -> None:
        self._leave([row for row in self._rows if row.ticket.cancelled], "cancelled")
        logits = self._read_prompts()
        self._choose(logits + self._decode([row for row in self._rows if row.made]))

    def _start_anew(self, problem: Exception) -> None:
        with self._wake:
            rows, self._rows = self._rows, []
        for row in rows:
            _tell(row.request.on_end, _error(problem))
        self._slots = slots_of(self._ready, self.rows, self.max_len)

    def _next(self) -> bool:
        """Waits for work, and gives the longest waiting requests places; False when the engine is to end."""
        with self._wake:
            while not (self._waiting or self._gone or self._rows or self._stopping):
                self._wake.wait()
            gone, self._gone = self._gone, []
            if self._stopping and not (self._finish and (self._waiting or self._rows or gone)):
                self._gone = gone
                return False
            while self._waiting and len(self._rows) < self.rows:
                ticket = self._waiting.popleft()
                self._rows.append(_Row(ticket, ticket.request, Chooser(ticket.request, self.vocabulary)))
        for ticket in gone:
            _tell(ticket.request.on_end, "cancelled")
        return True

    def _read_prompts(self) -> list[tuple[list[_Row], Tensor]]:
        """Reads prompts in the order of their coming, prompt_tokens of all in all -> those that are done, and the logits after them."""
        budget, parts = self.prompt_tokens, []
        for row in [row for row in self._rows if not row.made]:
            part = row.request.prompt_ids[row.read : row.read + self.prompt_tokens]
            if len(part) > budget:  # a prompt is cut at the same places whatever runs beside it
                break
            parts.append((row, part))
            budget -= len(part)
        done = []
        for row, part, logits in self._read(parts):
            row.read += len(part)
            self._prompts += len(part)
            if row.read == len(row.request.prompt_ids):
                done.append((row, logits))
        if done:
            try:
                self._slots.join([row.place for row, _ in done if row.place is not None])
            except (RuntimeError, TreadleError, MemoryError) as problem:  # for want of memory say; those that run stay as they are
                self._leave([row for row, _ in done], _error(problem))
                return []
        return [([row], logits) for row, logits in done]

    def _read(self, parts: list[tuple[_Row, list[int]]]) -> list[tuple[_Row, list[int], Tensor]]:
        """Parts of prompts with the logits after each; short beginnings of about one length are read together."""
        made: list[tuple[_Row, list[int], Tensor]] = []
        for group in _of_one_length(parts):
            for row, _ in group:
                row.place = row.place or self._slots.open(len(row.request.prompt_ids), row.request.max_new_tokens)
            logits: Tensor | None = None
            if len(group) > 1:
                try:
                    logits = self._slots.read_together([row.place for row, _ in group if row.place], [part for _, part in group])
                except (RuntimeError, TreadleError, MemoryError):
                    logits = None  # each alone, so that one takes no others with it
            for number, (row, part) in enumerate(group):
                assert row.place is not None
                try:
                    own = self._slots.read(row.place, part, {} if row.read else row.request.extras) if logits is None else logits[number : number + 1]
                except (RuntimeError, TreadleError, MemoryError) as problem:
                    self._leave([row], _error(problem))
                    continue
                made.append((row, part, own))
        return made

    def _decode(self, rows: list[_Row]) -> list[tuple[list[_Row], Tensor]]:
        """A step of the rows that run -> their logits [N, V]."""
        if not rows:
            return []
        places = [row.place for row in rows if row.place is not None]
        try:
            logits = self._slots.step(places, [row.last for row in rows])
        except (RuntimeError, TreadleError, MemoryError) as problem:  # which of the rows it was is not known, nor what they have seen
            self._leave(rows, _error(problem))
            return []
        return [(rows, logits)]

    def _choose(self, given: list[tuple[list[_Row], Tensor]]) -> None:
        """A token for each row that has logits; those that end leave."""
        if not given:
            return
        logits = given[0][1] if len(given) == 1 else torch.cat([own for _, own in given])
        rows = [row for some, _ in given for row in some]
        ended: dict[str, list[_Row]] = {}
        for row, token in zip(rows, Chooser.all(logits, [row.chooser for row in rows])):
            row.made += 1
            if token is None:
                ended.setdefault("error: the model's logits are not finite numbers", []).append(row)
                continue
            row.last = token.id
            if token.id in row.request.stop_ids:
                ended.setdefault("stop", []).append(row)
                continue
            self._tokens += 1
            try:
                stop = bool(row.request.on_token(token))
            except Exception as problem:  # a caller's own: its row ends, the others go on
                ended.setdefault(_error(problem), []).append(row)
                continue
            if stop or row.made == row.request.max_new_tokens:
                ended.setdefault("stop" if stop else "length", []).append(row)
        for reason, left in ended.items():
            self._leave(left, reason)

    def _leave(self, rows: list[_Row], reason: str) -> None:
        """Frees the rows' places, and says why."""
        if not rows:
            return
        self._slots.close([row.place for row in rows if row.place is not None])
        with self._wake:
            self._rows = [row for row in self._rows if row not in rows]
        for row in rows:
            _tell(row.request.on_end, reason)

    def _cancel_all(self) -> None:
        with self._wake:
            gone, self._gone = [*self._gone, *self._waiting], []
            self._waiting.clear()
        self._leave(list(self._rows), "cancelled")
        for ticket in gone:
            _tell(ticket.request.on_end, "cancelled")


def _of_one_length(parts: list[tuple[_Row, list[int]]]) -> list[list[tuple[_Row, list[int]]]]:
    """Groups that may be read together: of beginnings that are no longer than twice the shortest, so that little is padding."""
    groups: list[list[tuple[_Row, list[int]]]] = []
    for row, part in sorted(parts, key=lambda given: len(given[1])):
        alone = row.read > 0 or bool(row.request.extras) or len(part) < len(row.request.prompt_ids)
        if alone or not groups or not groups[-1] or len(part) > 2 * len(groups[-1][0][1]):
            groups.append([])
        groups[-1].append((row, part))
        if alone:
            groups.append([])
    return [group for group in groups if group]


def _longest(model: Any, max_len: int) -> tuple[int, str]:
    """(tokens that a row may have, what says so)."""
    most, scaling = model.longest_row, getattr(model.config, "rope_scaling", None)
    if scaling is not None and scaling["rope_type"] == "dynamic":  # beyond, a row's angles depend on how long its neighbours are
        most = min(most or max_len, model.config.max_position_embeddings)
    if most is not None and most < max_len:
        return most, "the model has positions for"
    return max_len, "a row holds"


def _error(problem: BaseException) -> str:
    return f"error: {' '.join(str(problem).split()) or type(problem).__name__}"


def _tell(on_end: Callable[[str], None], reason: str) -> None:
    try:
        on_end(reason)
    except Exception:  # a caller's own, and it has ended: nobody is left to hear of it
        return


def _leave(engine: weakref.ref[Engine]) -> None:
    """At exit: a thread that computes while the interpreter goes away would be stopped in the middle of a parallel loop."""
    found = engine()
    if found is not None:
        found.stop(finish=False, timeout=AT_EXIT)
