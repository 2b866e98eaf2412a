"""How messages become tokens, and which of the tokens a model learns from: Jinja chat templates as Hugging Face has them.

A template writes the messages of a conversation as one text with its control tokens. The assistant's parts are what stands between
`{% generation %}` and `{% endgeneration %}`; a template without these marks is rendered up to each assistant message, and what comes
after that prefix is the assistant's part. Ids and masks equal those of transformers' apply_chat_template on the same template. A
conversation whose parts cannot be told exactly, and one whose assistant's turn does not end in what ends a turn, is refused.

What a message says is never a control token: where it spells one, that spelling is encoded as ordinary text (transformers does so with
sanitize_control_tokens=True). A tokenizer without a template's control tokens has them as ordinary text, which a message could spell
too: such a message is refused (template_markers.py finds what they are).
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from treadle.errors import ConfigError, InputError, NothingLearnt, TreadleError
from treadle.text.template_markers import ROLES, Markers, Normalizes, Refused, markers_of

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"  # as transformers calls them
TRAIN_ON = ("assistant", "completion", "all")
# Private-use characters that stand around an assistant's part and around a control token that a message spells, in a rendered text only.
START, END, OPEN, CLOSE = "\U0010fff0", "\U0010fff1", "\U0010fff2", "\U0010fff3"
MARKS = re.compile(f"([{START}{END}{OPEN}{CLOSE}])")
SPELLED = re.compile(r"<\|[^|<>\s]{1,48}\|>")  # how templates spell control tokens of their own
BUILDS_MARKERS = re.compile(r"[<>\[\]|\r\n]")  # what no role holds: templates write roles into their markers
LONGEST = 1 << 25  # characters of one rendered conversation: a template is somebody else's program
LONGEST_TRIED = 1 << 20  # of the few words that its markers are found with, in about a hundred ways
ANSWER = "treadleanswer"  # what the assistant says where only the end of its turn is wanted

CHATML = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>{% endif %}

{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA3 = """\
{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim }}<|eot_id|>{% endgeneration %}\
{% else %}{{ message['content'] | trim }}<|eot_id|>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
# Every turn ends in the end-of-document token, which no text spells: a message that spells a heading is not read as one.
PLAIN = """\
{% for message in messages %}{{ message['role'] | capitalize }}:
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}\
{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}Assistant:
{% endif %}"""
NAMED = {"chatml": CHATML, "llama3": LLAMA3, "plain": PLAIN}

_OF_TOKENIZERS: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], Refused]] = weakref.WeakKeyDictionary()
Messages = Sequence[dict[str, Any]]
Named = tuple[tuple[str, str], ...]  # a tokenizer's named tokens
Offsets = list[tuple[int, int]]


class Encodes(Normalizes, Protocol):
    """What a template asks of a tokenizer."""

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""
    @property
    def control_tokens(self) -> dict[str, int]:
        """Special token -> id."""
    @property
    def added_tokens(self) -> dict[str, int]:
        """Token added to the vocabulary -> id."""
    @property
    def named_tokens(self) -> dict[str, str]:
        """"bos_token" and its like -> the token."""
    def encode_controlled(self, text: str, first: bool = True) -> tuple[list[int], Offsets]:
        """(ids, where each stands in the text), special tokens read as such."""
    def encode_literal(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are plain characters."""


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.exceptions.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """JSON as it is: Jinja's own filter escapes what HTML would read."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> Any:
    """The template in a sandbox where nothing can be changed; ConfigError where it is no Jinja."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: the body between START and END."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

        def marked(self, caller: Any) -> str:
            return START + caller() + END

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.exceptions.TemplateError as problem:
        raise ConfigError(f"the chat template is not valid Jinja: {problem}") from None


@dataclass
class _Rendered:
    """A conversation as text: pieces with whether a message spelled a control token there, and the assistant's parts by characters."""

    pieces: list[tuple[str, bool]] = field(default_factory=list)
    spans: Offsets = field(default_factory=list)

    @functools.cached_property
    def text(self) -> str:
        return "".join(piece for piece, _ in self.pieces)

    @functools.cached_property
    def literal(self) -> Offsets:
        """Where messages spell control tokens."""
        ends = np.cumsum([len(piece) for piece, _ in self.pieces]).tolist()
        return [(end - len(piece), end) for end, (piece, spelled) in zip(ends, self.pieces) if spelled]

    @classmethod
    def of(cls, marked: str) -> _Rendered:
        made, at, start, inside, plain = cls(), 0, None, False, ""
        for piece in MARKS.split(marked):
            if piece == START:
                start = at
            elif piece == END:
                if start is not None:
                    made.spans.append((start, at))
                start = None
            elif piece in (OPEN, CLOSE):
                if plain:
                    made.pieces.append((plain, inside))
                plain, inside = "", piece == OPEN
            else:
                plain, at = plain + piece, at + len(piece)
        made.pieces += [(plain, inside)] if plain or not made.pieces else []
        return made


def _without_nothing(messages: Messages) -> list[dict[str, Any]]:
    """The messages without keys of no value (content null, tool_calls null), which templates would write as None."""
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError('a message is a table with a role and a content: {"role": "user", "content": "..."}')
        if BUILDS_MARKERS.search(message["role"]):
            raise InputError(f"message {number} has the role {message['role'][:80]!r}, of which a template could make a control token; name "
                             "it without < > [ ] | and line ends")  # fmt: skip
    if not messages:
        raise InputError("a conversation without messages")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _strings(value: Any) -> Iterator[str]:
    """What a message says. Keys too, which tojson writes; one that is an identifier spells no marker, and is passed by to save time."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            if isinstance(key, str) and not key.isidentifier():
                yield key
            yield from _strings(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _strings(one)


def _with_marks(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return pattern.sub(lambda found: OPEN + found[0] + CLOSE, value)
    if isinstance(value, dict):
        for key in value:
            if isinstance(key, str) and not key.isidentifier() and (found := pattern.search(key)):
                raise InputError(f"a message has a key {key[:80]!r}, which spells the control token {found[0]!r}; only values can say one as "
                                 "ordinary text: name the key otherwise")  # fmt: skip
        return {key: _with_marks(one, pattern) for key, one in value.items()}
    return [_with_marks(one, pattern) for one in value] if isinstance(value, (list, tuple)) else value


class ChatTemplate:
    """A Jinja chat template: messages in, token ids and a mask of the tokens that are learnt out."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChatTemplate) and other.source == self.source

    def __hash__(self) -> int:
        return hash(self.source)

    @classmethod
    def named(cls, name: str) -> ChatTemplate:
        """ "chatml", "llama3", "plain", or a file. Raises ConfigError for another name, and for a file that is not Jinja."""
        if name in NAMED:
            return cls(NAMED[name])
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"chat_template = {name!r} is no template and no file; templates: {', '.join(NAMED)}, "
                              "or the path of a .jinja file")  # fmt: skip
        made = cls(_read(path))
        _compiled(made.source)
        return made

    @classmethod
    def of_folder(cls, folder: str | Path) -> ChatTemplate | None:
        """The template of a tokenizer's folder (chat_template.jinja, else the one in tokenizer_config.json), where there is one.
        InputError for a damaged file."""
        folder = Path(folder)
        if (folder / TEMPLATE_FILE).is_file():
            return cls(_read(folder / TEMPLATE_FILE))
        if not (folder / CONFIG_FILE).is_file():
            return None
        try:
            found = json.loads(_read(folder / CONFIG_FILE)).get("chat_template")
        except (ValueError, AttributeError, RecursionError):
            raise InputError(f"{folder / CONFIG_FILE} holds no table") from None
        if isinstance(found, list):  # several by name: [{"name": "default", "template": ...}, ...]
            found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}.get("default")
        return cls(found) if isinstance(found, str) else None

    def save(self, folder: str | Path) -> None:
        """Writes chat_template.jinja beside the tokenizer."""
        (Path(folder) / TEMPLATE_FILE).write_text(self.source, encoding="utf-8")

    def text(self, tokenizer: Encodes, messages: Messages, add_generation_prompt: bool = True) -> str:
        """What the template writes, control tokens spelled; for callers that take text alone (a message may spell them too)."""
        return _render(self.source, _without_nothing(messages), add_generation_prompt, tokenizer.named_tokens)

    def prompt_ids(self, tokenizer: Encodes, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
        """What the assistant's answer to `messages` is continued from."""
        return self._ids(tokenizer, self._render(tokenizer, messages, add_generation_prompt))[0]

    def encode(
        self, tokenizer: Encodes, messages: Messages, train_on: str = "assistant", first_turn: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """A whole conversation: (ids int32 [N], mask bool [N]); the mask holds where a token is learnt.

        train_on: every turn of the assistant (from its turn number first_turn on), "completion" (its last turn), or "all" tokens. Raises
        NothingLearnt where no token would be learnt, and InputError, which says why, where the assistant's parts cannot be told exactly.
        ConfigError for another train_on.
        """
        if train_on not in TRAIN_ON:
            raise ConfigError(f"data.train_on = {train_on!r}: choose one of {', '.join(TRAIN_ON)}")
        rendered = self._render(tokenizer, messages)
        ids, offsets = self._ids(tokenizer, rendered)
        mask = np.ones(len(ids), dtype=bool)
        if train_on != "all":
            spans = self._spans(tokenizer, messages, rendered, offsets)
            mask = _overlapping(offsets, spans[-1:] if train_on == "completion" else spans[first_turn:])
        if not mask.any():
            raise NothingLearnt("no token of the conversation would be learnt: the assistant says nothing in it")
        return np.asarray(ids, dtype=np.int32), mask

    def turn_end(self, tokenizer: Encodes) -> str:
        """What the template writes to end an assistant's turn: a control token of the tokenizer where there is one, else a text."""
        return _turn_end(self.source, _named(tokenizer), tuple(self.controls(tokenizer)))

    def stop_ids(self, tokenizer: Encodes) -> list[int]:
        """The token that ends an assistant's turn, and the one that ends a document."""
        end = self.controls(tokenizer).get(self.turn_end(tokenizer))
        return sorted({tokenizer.eos_id} | ({end} if end is not None else set()))

    def further_ends(self, tokenizer: Encodes) -> list[int]:
        """The tokens beside the end of a document at which others have to stop who read an export; none where the template does not say."""
        try:
            return [token for token in self.stop_ids(tokenizer) if token != tokenizer.eos_id]
        except TreadleError:
            return []

    def stop_text(self, tokenizer: Encodes) -> str | None:
        """The text that ends an assistant's turn, where the tokenizer has no token for it."""
        end = self.turn_end(tokenizer)
        return None if end in self.controls(tokenizer) else end

    def controls(self, tokenizer: Encodes) -> dict[str, int]:
        """Spelling -> id of what the template may write and a message may not: special tokens, and added ones that stand in the template
        or that it writes (<think> often is one)."""
        added = tokenizer.added_tokens
        if not added:
            return tokenizer.control_tokens
        made = _markers(self.source, _named(tokenizer), ())
        own = {token: i for token, i in added.items() if token in self.source or token in made.turns or token in made.inner}
        return {**tokenizer.control_tokens, **own}

    def _render(self, tokenizer: Encodes, messages: Messages, add_generation_prompt: bool = False) -> _Rendered:
        messages = _without_nothing(messages)
        controls = self.controls(tokenizer)
        others = tuple(sorted({message["role"] for message in messages} - set(ROLES)))
        for role in others:  # known to hold no marker as it is written
            if BUILDS_MARKERS.search(tokenizer.normalized(role)):
                raise InputError(f"this tokenizer reads the role {role[:80]!r} as one with < > [ ] or |; name it without them")
        refused = _refused(tokenizer, self.source, _named(tokenizer), others, tuple(controls))
        for number, message in enumerate(messages, 1):
            texts = [*_strings(message)]
            if any(map(MARKS.search, texts)):
                raise InputError("a message holds a private-use character U+10FFF0 to U+10FFF3, which chat templates use as marks")
            refused.check(number, message["role"], texts, tokenizer)
        pattern = refused.controls
        if pattern is not None and any(pattern.search(said) for said in _strings(messages)):
            messages = _with_marks(messages, pattern)
        return _Rendered.of(_render(self.source, messages, add_generation_prompt, tokenizer.named_tokens))

    @staticmethod
    def _ids(tokenizer: Encodes, rendered: _Rendered) -> tuple[list[int], Offsets]:
        ids: list[int] = []
        offsets: Offsets = []
        at = 0
        for piece, spelled in rendered.pieces:
            if spelled:
                new = tokenizer.encode_literal(piece)
                ids, offsets = ids + new, offsets + [(at, at + len(piece))] * len(new)
            else:
                new, places = tokenizer.encode_controlled(piece, first=at == 0)
                ids, offsets = ids + new, offsets + [(at + a, at + b) for a, b in places]
            at += len(piece)
        return ids, offsets

    def _spans(self, tokenizer: Encodes, messages: Messages, rendered: _Rendered, offsets: Offsets) -> Offsets:
        """The assistant's parts by characters, each with the end of its turn."""
        end, turns = self.turn_end(tokenizer), sum(message["role"] == "assistant" for message in messages)
        if turns == 0:
            raise NothingLearnt("no message of the assistant: no token of the conversation would be learnt")
        if "generation" in self.source and _marked(self.source):
            spans = rendered.spans
            if len(spans) != turns:
                refusal = InputError if spans else NothingLearnt
                raise refusal(f"{turns} messages of the assistant, and the template marks {len(spans)} with "
                              "{% generation %}: which tokens to learn cannot be told")  # fmt: skip
            if not _marks_answers(self.source, _named(tokenizer)):
                raise InputError("the template's {% generation %} does not stand around what the assistant says")
        else:
            spans = self._by_prefixes(tokenizer, messages, rendered, end)
            borders = {start for start, _ in offsets}
            for start, _ in spans:
                if start not in borders:
                    raise InputError("a token lies across the border of the assistant's part, so a prompt would be encoded otherwise than "
                                     "here; mark the part in the template with {% generation %} ... {% endgeneration %}")  # fmt: skip
        for start, stop in spans:
            part = rendered.text[start:stop]
            if not (part.rstrip().endswith(end.rstrip()) if end.strip() else part.endswith(end)):
                raise InputError(f"the template's {{% generation %}} part ends before {end!r}, which ends the assistant's turn: a model "
                                 "would never learn to stop; put it before {% endgeneration %}")  # fmt: skip
        return spans

    def _by_prefixes(self, tokenizer: Encodes, messages: Messages, rendered: _Rendered, end: str) -> Offsets:
        """What the template adds to its prompt for each assistant message, up to the end of the turn."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(tokenizer, messages[:number], True).text if number else ""
            so_far = self._render(tokenizer, messages[: number + 1])
            if not so_far.text.startswith(before) or not rendered.text.startswith(so_far.text):
                raise InputError(f"message {number + 1}: the template writes a conversation otherwise once it goes on (its rendering up to "
                                 "there is no prefix of the whole), so which tokens are the assistant's cannot be told; mark them "
                                 "in the template with {% generation %} ... {% endgeneration %}")  # fmt: skip
            at = len(so_far.text)
            while (at := so_far.text.rfind(end, len(before), at)) >= 0:
                if not any(a <= at < b for a, b in so_far.literal):
                    break
            if at < 0:
                raise InputError(f"message {number + 1}: the assistant's turn does not end in {end!r}")
            heading = so_far.text[len(before) : max(so_far.text.find(str(message.get("content", "")).strip(), len(before)), len(before))].strip()
            if heading and _writes_no_prompt(self.source, _named(tokenizer)):
                raise InputError(f"the template writes {heading[:80]!r} before an answer and nothing for add_generation_prompt: a model would "
                                 "learn to write that itself, and no prompt would ask for it. Let the template write it under "
                                 "{% if add_generation_prompt %} as well")  # fmt: skip
            spans.append((len(before), at + len(end)))
        return spans


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as problem:
        raise InputError(f"{path} cannot be read: {problem}") from None


def _render(source: str, messages: Messages, add_generation_prompt: bool, named: dict[str, str], longest: int = LONGEST) -> str:
    import jinja2

    pieces, size = [], 0
    try:
        for piece in _compiled(source).generate(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **named
        ):
            pieces.append(piece)
            size += len(piece)
            if size > longest:
                raise InputError(f"the chat template writes more than {longest} characters for one conversation")
    except jinja2.exceptions.TemplateError as problem:
        raise InputError(f"the chat template refuses the conversation: {problem}") from None
    except InputError:
        raise
    except Exception as problem:  # a template is somebody else's program, and fails in any way that a program can
        raise InputError(f"the chat template fails on the conversation: {type(problem).__name__}: {problem}") from None
    return "".join(pieces)


def _named(tokenizer: Encodes) -> Named:
    return tuple(sorted(tokenizer.named_tokens.items()))


@functools.lru_cache(maxsize=64)
def _markers(source: str, named: Named, roles: tuple[str, ...]) -> Markers:
    """What the template writes around messages, of these roles too; once for a template, since some fifty conversations are rendered."""
    return markers_of(lambda messages, prompt: MARKS.sub("", _render(source, messages, prompt, dict(named), LONGEST_TRIED)), roles)


def _refused(tokenizer: Encodes, source: str, named: Named, roles: tuple[str, ...], controls: tuple[str, ...]) -> Refused:
    """What messages of these roles may not say to this tokenizer."""
    known, key = _OF_TOKENIZERS.setdefault(tokenizer, {}), (source, named, roles, controls)
    found = known.get(key)
    if found is None:
        made = _markers(source, named, roles)
        if len(known) >= 64:  # many sets of roles; other threads may be reading
            known.clear()
        found = known[key] = Refused.of({*made.turns, *SPELLED.findall(source)}, {*made.inner}, controls, tokenizer)
    return found


@functools.lru_cache(maxsize=64)
def _marked(source: str) -> bool:
    """Whether the template marks the assistant's parts."""
    return bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source))


@functools.lru_cache(maxsize=64)
def _marks_answers(source: str, named: Named) -> bool:
    """Whether what an assistant says stands inside the marked parts."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
    made = _Rendered.of(_render(source, messages, False, dict(named)))
    return any(ANSWER in made.text[start:stop] for start, stop in made.spans)


@functools.lru_cache(maxsize=64)
def _writes_no_prompt(source: str, named: Named) -> bool:
    """Whether a prompt looks the same with add_generation_prompt and without it."""
    with_it, without = (_render(source, [{"role": "user", "content": "?"}], asked, dict(named)) for asked in (True, False))
    return with_it == without


@functools.lru_cache(maxsize=64)
def _turn_end(source: str, named: Named, controls: tuple[str, ...]) -> str:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
    text = MARKS.sub("", _render(source, messages, False, dict(named)))
    _, found, after = text.rpartition(ANSWER)
    if not found:
        raise ConfigError("the chat template does not write what the assistant says")
    spelled = [(after.find(control), -len(control), control) for control in controls if control in after]
    if spelled:
        return min(spelled)[2]
    end = SPELLED.search(after)
    if end is None and not after:
        raise ConfigError("the chat template writes nothing after what the assistant says, so a model would never learn to stop; "
                          "end the turn with {{ eos_token }}")  # fmt: skip
    return end[0] if end is not None else after.strip() or after


def _overlapping(offsets: Offsets, spans: Offsets) -> np.ndarray:
    """bool [N]: the token shares a character with one of the spans (both in order)."""
    mask, which = np.zeros(len(offsets), dtype=bool), 0
    for token, (start, end) in enumerate(offsets):
        while which < len(spans) and start >= spans[which][1]:
            which += 1
        if which == len(spans):
            break
        mask[token] = end > spans[which][0]
    return mask
