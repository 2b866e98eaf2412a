"""A model of treadle's as lm-evaluation-harness asks one: log-likelihoods of continuations and of whole texts, and generation.

The questions are the harness's own (lm_eval.api.model.TemplateLM splits a text into context and continuation); what is answered
equals its model `hf` on the exported folder. Imported only where lm_eval is installed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from treadle.data.batch import Batch
from treadle.errors import ConfigError, InputError, TreadleError
from treadle.evaluation.answers import Answers
from treadle.generation.engine import Engine, Request
from treadle.generation.sampling import Sampling
from treadle.generation.text_stream import TextStream
from treadle.layers.quantized_linear import rounded_products
from treadle.models.base import Model
from treadle.text.base import Tokenizer

NEW_TOKENS = 256  # where a task does not say; the harness's own number
LENGTH = 2048  # of a model that holds rows of any length and was not told otherwise; the harness's own number
LOGITS = 64 << 20  # numbers of logits in one pass: fewer rows than asked for where a vocabulary is large (256 MB in fp32)
KEPT = ("temperature", "top_k", "top_p", "repetition_penalty")  # of a task's generation_kwargs; others are refused
UNUSED = ("do_sample", "until", "num_beams", "max_length")  # of those, what is handled elsewhere or changes nothing

Pair = tuple[tuple[str, str] | None, list[int], list[int]]  # (the texts, context, continuation)


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """Answers of one model."""

    tokenizer_name = "treadle"

    def __init__(
        self, model: Model, tokenizer: Tokenizer, *, batch_size: int = 16, max_length: int | None = None, stop_ids: Sequence[int] = (),
        answers: Answers | None = None,
    ) -> None:  # fmt: skip
        """batch_size: most rows in a pass; max_length: tokens of a row, by default those that the model's configuration names;
        stop_ids: tokens that end a generation beside the tokenizer's own; answers: where they are kept."""
        super().__init__()
        if not model.capabilities.decodes:
            raise ConfigError(f"a {model.arch} model writes no text from left to right, so these tasks cannot be asked of it")
        self.model, self._tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        most = max_length or getattr(model.config, "max_position_embeddings", None) or LENGTH
        self.max_length = min(most, model.longest_row or most)
        self._stop_ids = frozenset({tokenizer.eos_id, *stop_ids})
        self._answers = answers or Answers(None)
        self._device = model.device
        self._spelled = {**tokenizer.control_tokens, **tokenizer.added_tokens}
        named = tokenizer.named_tokens
        self._begin = tokenizer.bos_id if tokenizer.kind != "byte" else None  # what the tokenizer puts before a text
        self._prefix = self._spelled.get(named.get("bos_token", ""), tokenizer.start_id)

    # ---- tokens ----

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        """Ids of a text; special tokens that it spells are those tokens, as the harness's prompts of conversations need it."""
        if any(token in string for token in self._tokenizer.control_tokens):
            ids = self._tokenizer.encode_controlled(string)[0]
        else:
            ids = self._tokenizer.encode(string).tolist()
        begins = self._begin is not None and add_special_tokens is not False and ids[:1] != [self._begin]
        return [self._begin, *ids] if begins and self._begin is not None else ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._tokenizer.chat_template.source if self._tokenizer.chat_template is not None and chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's own template writes it; ConfigError for a model without one."""
        if self._tokenizer.chat_template is None:
            raise ConfigError("--apply_chat_template: this model has no chat template; leave it out")
        return self._tokenizer.chat_template.text(self._tokenizer, chat_history, add_generation_prompt)

    # ---- log-likelihoods ----

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        known = [self._answers.get("loglikelihood", request.args) for request in requests]
        missing = [request for request, answer in zip(requests, known) if answer is None]
        new = iter(super().loglikelihood(missing, disable_tqdm=True) if missing else [])
        return [(float(answer[0]), bool(answer[1])) for answer in (next(new) if one is None else one for one in known)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        totals = []
        for request in requests:
            total = self._answers.get("loglikelihood_rolling", request.args)
            if total is None:
                windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1)
                found = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
                total = sum(log for log, _ in found)
                self._answers.add("loglikelihood_rolling", request.args, total)
            totals.append(float(total))
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_options: Any) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether each of its tokens is the likeliest). A context too long for a row loses
        its beginning."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        rows: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}  # what the model reads -> who asks, and for what
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise InputError(f"a continuation has {len(continuation)} tokens and a row of the model {self.max_length}")
            if continuation:
                row = tuple(((context or [self.prefix_token_id]) + continuation)[-(self.max_length + 1) :][:-1])
                rows.setdefault(row, []).append((number, continuation))
        for batch in self._batches(sorted(rows, key=len, reverse=True)):
            logits = self._logits(batch)
            for row, own in zip(batch, logits):
                for number, continuation in rows[row]:
                    answers[number] = _likelihood(own[len(row) - len(continuation) : len(row)], continuation)
                    question = requests[number][0]
                    if question is not None:
                        self._answers.add("loglikelihood", question, list(answers[number]))
        return answers

    def _batches(self, rows: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """The longest first: rows of about one length share a pass, and too little memory shows at once."""
        at = 0
        while at < len(rows):
            count = max(1, min(self.batch_size, LOGITS // (len(rows[at]) * self.model.vocab_size)))
            yield rows[at : at + count]
            at += count

    @torch.inference_mode()
    def _logits(self, rows: list[tuple[int, ...]]) -> torch.Tensor:
        """[B, T, V]; what follows the end of a shorter row changes nothing before it."""
        padded = torch.zeros(len(rows), len(rows[0]), dtype=torch.long)
        for place, row in enumerate(rows):
            padded[place, : len(row)] = torch.tensor(row)
        with rounded_products():  # of a model in fewer bits, rows of every length
            return self.model(Batch.from_ids(padded).to(self._device)).logits

    # ---- generation ----

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        known = [self._answers.get("generate_until", request.args) for request in requests]
        missing = [number for number, answer in enumerate(known) if answer is None]
        asked = {number: self._asked(number, *requests[number].args) for number in missing}
        longest = max((len(one.request.prompt_ids) + one.request.max_new_tokens for one in asked.values()), default=0)
        engine = Engine(self.model, rows=min(self.batch_size, len(missing)), max_len=longest, queue=len(missing)) if missing else None
        try:
            for number in sorted(missing, key=lambda n: -len(asked[n].request.prompt_ids)):
                assert engine is not None
                engine.submit(asked[number].request)
            if engine is not None:
                engine.start()
            for number in missing:
                known[number] = asked[number].result()
                if asked[number].request.sampling.temperature == 0:
                    self._answers.add("generate_until", requests[number].args, known[number])
        finally:
            if engine is not None:
                engine.stop(finish=False)
        return [str(answer) for answer in known]

    def _asked(self, number: int, context: str, given: dict[str, Any]) -> _Asked:
        wanted = dict(normalize_gen_kwargs(given, NEW_TOKENS))
        until, count = handle_stop_sequences(wanted.pop("until", None), eos=None), int(wanted.pop("max_gen_toks"))
        room = self.max_length - count
        if room < 1:
            raise ConfigError(f"{count} new tokens are asked for, and a row of the model has {self.max_length}; give --max_length")
        if other := sorted(wanted.keys() - {*KEPT, *UNUSED}) or (["num_beams"] if wanted.get("num_beams", 1) != 1 else []):
            raise ConfigError(f"a task asks for generation with {', '.join(other)}, which is not computed")
        drawn = {"top_k": 0, "top_p": 1.0, **{key: wanted[key] for key in KEPT if wanted.get(key) is not None}}
        sampling = Sampling(**{"temperature": 0.0 if not wanted.get("do_sample") else 1.0, **drawn})
        ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        return _Asked(self._tokenizer, ids, count, sampling, number, self._stop_ids, until)


class _Asked:
    """One generation: gathers tokens until one of the texts in `until` is among them."""

    def __init__(
        self, tokenizer: Tokenizer, ids: list[int], count: int, sampling: Sampling, seed: int, stop_ids: frozenset[int], until: list[str]
    ) -> None:
        self._tokenizer, self._until, self._ids = tokenizer, until, list[int]()
        self._stream = TextStream(tokenizer, (), [end for end in until if end])
        self._ended, self._reason = threading.Event(), ""
        self.request = Request(ids, count, sampling, seed=seed, stop_ids=stop_ids, on_token=self._add, on_end=self._end)

    def _add(self, token: Any) -> bool:
        self._ids.append(token.id)
        if any(self._until):
            self._stream.push(token.id)
        return self._stream.stopped

    def _end(self, reason: str) -> None:
        self._reason = reason
        self._ended.set()

    def result(self) -> str:
        self._ended.wait()
        if self._reason not in ("stop", "length"):
            raise TreadleError(f"a generation ended early ({self._reason})")
        return postprocess_generated_text(self._tokenizer.decode(self._ids), self._until, None)


def _likelihood(logits: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Of the logits [N, V] that predict the N tokens of a continuation."""
    logs, wanted = logits.float().log_softmax(-1), torch.tensor(continuation, device=logits.device)
    return float(logs.gather(1, wanted[:, None]).sum()), bool((logs.argmax(-1) == wanted).all())
