"""From the body of a request in OpenAI's format to what the model is asked.

The fields are those of the API reference of OpenAI (platform.openai.com/docs/api-reference: completions, chat), with top_k
and repetition_penalty beside them. What this server cannot do is refused by name, never ignored in silence; what changes no
answer (metadata, user, ...) is ignored.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from treadle.errors import TreadleError
from treadle.generation.sampling import Sampling
from treadle.serving import fields
from treadle.serving.limits import Limits, RequestError
from treadle.text.base import Tokenizer

if TYPE_CHECKING:
    from treadle.text.chat_template import ChatTemplate

COMPLETION_TOKENS = 16  # max_tokens of a completion that names none, as the API reference has it
MOST_LOGPROBS = 20
# Fields that ask for nothing which changes an answer here.
IGNORED = frozenset({"user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key", "safety_identifier",
                     "prompt_cache_retention", "verbosity", "reasoning_effort", "prediction"})  # fmt: skip
NEUTRAL: dict[str, Any] = {"min_p": 0, "ignore_eos": False}  # vLLM's, where they ask for nothing
SAMPLED = frozenset({"model", "n", "max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "frequency_penalty",
                     "presence_penalty", "logit_bias", "seed", "stop", "stream", "stream_options", "logprobs"})  # fmt: skip
OF_COMPLETION = SAMPLED | {"prompt", "suffix", "echo", "best_of"}
OF_CHAT = SAMPLED | {"messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "functions", "function_call",
                     "response_format", "modalities", "audio", "web_search_options"}  # fmt: skip
# name is the API reference's; the others stand in answers, which clients send back as they got them.
OF_MESSAGE = frozenset({"role", "content", "name", "refusal", "annotations", "audio", "tool_calls", "function_call", "reasoning_content"})
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Served:
    """A model as the protocol sees it. defaults: the keys of Sampling, and max_new_tokens of a chat, that hold where a request says
    nothing."""

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    limits: Limits
    template: ChatTemplate | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def default(self, name: str) -> Any:
        """A key of Sampling where a request says nothing."""
        return self.defaults.get(name, getattr(Sampling, name))

    @functools.cached_property
    def longest_token(self) -> int:
        """Bytes."""
        return int(self.tokenizer.byte_lengths.max())


@dataclass(frozen=True)
class Asked:
    """What one request asks: for each prompt n continuations. echoes: the prompts as texts, where they are to be repeated.
    logprobs: likeliest tokens to report beside each drawn one; None for no probabilities at all."""

    chat: bool
    prompts: list[list[int]]
    n: int
    max_new_tokens: int
    sampling: Sampling
    seed: int
    stops: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    stream: bool = False
    include_usage: bool = False
    logit_bias: dict[int, float] = field(default_factory=dict)
    echoes: list[str] | None = None


def completion(body: dict[str, Any], served: Served) -> Asked:
    """The body of /v1/completions. RequestError 400 says what is wrong with it, 404 that it names another model."""
    _known(body, OF_COMPLETION, served)
    if body.get("suffix"):
        raise RequestError(400, "suffix is not supported: this model writes on from a prompt, it fills no gap", "suffix")
    n = _n(body)
    if fields.whole(body, "best_of", n, 1) != n:
        raise RequestError(400, f"best_of is not supported beside n; leave it out, or ask for n = {body.get('best_of')}", "best_of")
    prompts, texts = _prompts(body.get("prompt"), served)
    echo = fields.flag(body, "echo")
    logprobs = fields.whole(body, "logprobs", None, 0, MOST_LOGPROBS)
    if echo and logprobs is not None:
        raise RequestError(400, "echo with logprobs is not supported: the probabilities of a prompt's own tokens are not kept; "
                           "leave one of them out", "echo")  # fmt: skip
    most = served.limits.max_new_tokens
    count = fields.whole(body, "max_tokens", min(COMPLETION_TOKENS, most), 0)
    return _asked(body, served, prompts, n, count, "max_tokens", logprobs, echoes=texts if echo else None)


def chat(body: dict[str, Any], served: Served) -> Asked:
    """The body of /v1/chat/completions. RequestError as for `completion`."""
    _known(body, OF_CHAT, served)
    _refuse_tools(body)
    if served.template is None:
        raise RequestError(400, f"{served.name} has no chat template, so it holds no conversation: use /v1/completions, or start the server "
                           "with --chat_template chatml, llama3, plain or FILE.jinja", "messages", "no_chat_template")  # fmt: skip
    messages = _messages(body.get("messages"))
    _short_enough(sum(len(message["content"].encode()) for message in messages), served, "messages")
    try:
        prompt = served.template.prompt_ids(served.tokenizer, messages)
    except TreadleError as problem:  # a template that refuses these roles in this order
        raise RequestError(400, f"the chat template refuses these messages: {problem}", "messages") from None
    wanted = fields.flag(body, "logprobs")
    top = fields.whole(body, "top_logprobs", 0, 0, MOST_LOGPROBS)
    if top and not wanted:
        raise RequestError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    name = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    most = served.limits.max_new_tokens
    count = fields.whole(body, name, min(most, served.defaults.get("max_new_tokens", most)), 1)
    ends = frozenset(int(token) for token in served.template.stop_ids(served.tokenizer))
    end_text = served.template.stop_text(served.tokenizer)
    return _asked(body, served, [list(map(int, prompt))], _n(body), count, name, top if wanted else None, chat=True, ends=ends,
                  end_texts=(end_text,) if end_text else ())  # fmt: skip


def _known(body: dict[str, Any], known: frozenset[str], served: Served) -> None:
    unknown = sorted(name for name in body if name not in known and name not in IGNORED and (name not in NEUTRAL or body[name] != NEUTRAL[name]))
    if unknown:
        raise RequestError(400, f"unknown field {unknown[0][:80]!r}; this server knows {', '.join(sorted(known))}", unknown[0][:80])
    model = body.get("model")
    if model is not None and model != served.name:
        shown = repr(model)[:80]
        raise RequestError(404, f"the model {shown} is not served here; this is {served.name!r} (or leave model out)", "model", "model_not_found")


def _refuse_tools(body: dict[str, Any]) -> None:
    for name in ("tools", "functions", "audio", "web_search_options"):
        if body.get(name):
            raise RequestError(400, f"{name} is not supported by this server; leave it out", name)
    for name, good in (("tool_choice", (None, "none", "auto")), ("function_call", (None, "none", "auto")),
                       ("modalities", (None, ["text"])), ("response_format", (None, {"type": "text"}))):  # fmt: skip
        if body.get(name) not in good:
            raise RequestError(400, f"this {name} is not supported by this server, which writes plain text; leave it out", name)


def _messages(value: Any) -> list[dict[str, str]]:
    """[{role, content}] with the content as text."""
    if not isinstance(value, list) or not value:
        raise fields.bad("messages", "a list of at least one message")
    found = []
    for number, message in enumerate(value):
        place = f"messages[{number}]"
        if not isinstance(message, dict):
            raise fields.bad(place, "an object with role and content")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise RequestError(400, f"{place}.role must be one of {', '.join(ROLES)}", f"{place}.role")
        if message.get("tool_calls") or message.get("function_call"):
            raise RequestError(400, f"{place} calls a tool, which this server does not support", place)
        if unknown := sorted(key for key, given in message.items() if key not in OF_MESSAGE and given is not None):
            raise RequestError(400, f"{place} has an unknown field {unknown[0][:80]!r}; a message has role and content (ignored: "
                               f"{', '.join(sorted(OF_MESSAGE - {'role', 'content'}))})", f"{place}.{unknown[0][:80]}")  # fmt: skip
        found.append({"role": ROLES[role], "content": _content(message.get("content"), f"{place}.content")})
    return found


def _content(value: Any, place: str) -> str:
    if not isinstance(value, list):
        return fields.text(value, place)
    parts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RequestError(400, f"{place} holds a part that is no text; this model reads text alone", place)
        parts.append(fields.text(part.get("text"), place))
    return "".join(parts)


def _prompts(value: Any, served: Served) -> tuple[list[list[int]], list[str]]:
    """(ids, texts) of a prompt: text, ids, or a list of either; nothing is the beginning of a document."""
    tokenizer = served.tokenizer
    if value is None or value == []:
        value = ""
    several = value if isinstance(value, list) and not _is_ids(value) else [value]
    if len(several) > served.limits.max_choices:
        raise fields.bad("prompt", f"at most {served.limits.max_choices} prompts")
    ids, texts = [], []
    for one in several:
        if isinstance(one, list):
            if not one or not _is_ids(one):
                raise fields.bad("prompt", "a string, a list of token ids, or a list of strings or of such lists")
            if not all(0 <= token < served.vocab_size for token in one):
                raise RequestError(400, f"prompt has ids outside 0..{served.vocab_size - 1}", "prompt")
            ids.append(list(one))
            texts.append(tokenizer.decode(one))
        else:
            texts.append(fields.text(one, "prompt"))
            _short_enough(len(texts[-1].encode()), served, "prompt")
            ids.append(list(map(int, tokenizer.prompt_ids(texts[-1]))))
    return ids, texts


def _short_enough(size: int, served: Served, place: str) -> None:
    """Refuses a text of so many bytes that no tokens within the limit spell it, before any time is spent on its tokens."""
    if size > served.limits.max_prompt_tokens * served.longest_token:
        raise RequestError(400, f"the prompt has {size} bytes, more than {served.limits.max_prompt_tokens} tokens can hold; this server takes at "
                           "most so many (--max-prompt-tokens)", place, "context_length_exceeded")  # fmt: skip


def _is_ids(value: Sequence[Any]) -> bool:
    return all(isinstance(token, int) and not isinstance(token, bool) for token in value)


def _n(body: dict[str, Any]) -> int:
    return fields.whole(body, "n", 1, 1) or 1


def _asked(body: dict[str, Any], served: Served, prompts: list[list[int]], n: int, count: int | None, count_name: str,
           logprobs: int | None, chat: bool = False, ends: frozenset[int] = frozenset(), end_texts: tuple[str, ...] = (),
           echoes: list[str] | None = None) -> Asked:  # fmt: skip
    """What both kinds of request share: limits, sampling, stops and streaming."""
    limits, count = served.limits, count or 0
    longest = max(map(len, prompts))
    place = "messages" if chat else "prompt"
    if longest > limits.max_prompt_tokens:
        raise RequestError(400, f"the prompt has {longest} tokens; this server takes at most {limits.max_prompt_tokens} "
                           "(--max-prompt-tokens)", place, "context_length_exceeded")  # fmt: skip
    if count > limits.max_new_tokens:
        raise RequestError(400, f"{count_name} = {count}: this server writes at most {limits.max_new_tokens} tokens "
                           "(--max-new-tokens)", count_name)  # fmt: skip
    if n * len(prompts) > limits.max_choices:
        raise RequestError(400, f"{n} continuations of {len(prompts)} prompts: at most {limits.max_choices} in one request", "n")
    for name in ("frequency_penalty", "presence_penalty"):
        if fields.number(body, name, 0.0, -2, 2) != 0:
            raise RequestError(400, f"{name} is not supported; repetition_penalty (above 1: repeat less) is", name)
    sampling = Sampling(
        fields.number(body, "temperature", served.default("temperature"), 0, 2),
        max(0, fields.whole(body, "top_k", served.default("top_k"), -1, 1 << 30) or 0),  # -1 is off elsewhere, as 0 is here
        # A nucleus of nothing is its likeliest token, as 0 is elsewhere.
        max(1e-9, fields.number(body, "top_p", served.default("top_p"), 0, 1)),
        fields.number(body, "repetition_penalty", served.default("repetition_penalty"), 0.01, 100),
    )
    stream, options = fields.flag(body, "stream"), body.get("stream_options")
    if options is not None and (not isinstance(options, dict) or not stream):
        raise RequestError(400, "stream_options is an object, and needs stream: true", "stream_options")
    include = fields.flag(options or {}, "include_usage")
    seed = fields.whole(body, "seed", None, -(1 << 63), (1 << 64) - 1)
    return Asked(
        chat, prompts, n, count, sampling, secrets.randbits(31) if seed is None else seed % (1 << 63),
        (*fields.texts(body.get("stop"), "stop", 16, 1000), *end_texts), ends | {served.tokenizer.eos_id}, logprobs, stream, include,
        fields.token_biases(body.get("logit_bias"), "logit_bias", served.vocab_size), echoes,
    )  # fmt: skip
