"""Conversations as data: every form of row, what is learnt of it, packing and isolation, what is left out, and the same bits again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import treadle as command
from treadle.data.base import BatchPlan
from treadle.data.batch import IGNORE, Batch
from treadle.data.conversations import CUT, TOO_LONG, Conversations
from treadle.data.dataset import splits_of
from treadle.data.messages import SHAREGPT
from treadle.data.preferences import Preferences
from treadle.data.settings import DataSettings
from treadle.errors import ConfigError, DataError, InputError
from treadle.text.settings import TokenizerSettings

BYTES = TokenizerSettings(name="byte")


def talk(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


@pytest.fixture()
def written(tmp_path: Path) -> Callable[..., str]:
    def write(*rows: Any, name: str = "talk.jsonl") -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(tmp_path / name)

    return write


def opened(path: str, kind: str = "conversations", **keys: Any) -> dict[str, Any]:
    wanted = {"seq_len": 64, "validation_fraction": 0.0, "chat_template": "plain", **keys}
    return splits_of(DataSettings(path=path, dataset_class=kind, **wanted), BYTES)


def learnt(data: Conversations, separator: str = "|") -> list[str]:
    """Of each document the tokens that its labels ask for, with | for the end of a turn."""
    found = []
    for batch in data.in_sequence(1):
        assert batch.labels is not None and batch.doc_ids is not None
        for document in range(int(batch.doc_ids.max()) + 1):
            labels = batch.labels[0][(batch.doc_ids[0] == document) & (batch.labels[0] != IGNORE)].tolist()
            found.append("".join(separator if t == data.tokenizer.eos_id else data.tokenizer.decode([t]) for t in labels))
    return sorted(found)


FORMS = [
    ({"messages": talk("ask", "say")}, "say|"),
    ({"messages": talk("ask", "say", "more", "end")}, "say|end|"),
    ({"messages": [{"role": "system", "content": "be"}, *talk("ask", "say")]}, "say|"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "ask"}]}, talk("", "say")[1]]}, "say|"),
    ({"prompt": "ask", "completion": "say"}, "say|"),
    ({"prompt": talk("ask", "one", "two"), "completion": talk("", "say")[1:]}, "say|"),
    ({"prompt": talk("ask"), "completion": talk("ask", "say")}, "say|"),
    ({"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "say"}]}, "say|"),
    ({"conversations": talk("ask", "say"), "messages": None}, "say|"),
    ({"text": "all of it"}, "ll of it|"),
]


@pytest.mark.parametrize("row, wanted", FORMS, ids=range(len(FORMS)))
def test_every_form_of_row(row: dict[str, Any], wanted: str, written: Callable[..., str]) -> None:
    data = opened(written(row))["train"]
    assert learnt(data) == [wanted]
    assert (SHAREGPT in data.describe()) == ("from" in json.dumps(row))


def test_what_is_learnt_is_chosen(written: Callable[..., str]) -> None:
    path = written({"messages": talk("ask", "say", "more", "end")})
    assert learnt(opened(path, train_on="completion")["train"]) == ["end|"]
    assert learnt(opened(path, train_on="all")["train"]) == ["ser:\nask|Assistant:\nsay|User:\nmore|Assistant:\nend|"]
    raw = written({"prompt": "ask: ", "completion": "say"}, {"prompt": "b", "completion": "c"}, name="raw.jsonl")
    assert learnt(opened(raw, chat_template="none")["train"]) == ["c|", "say|"]
    assert learnt(opened(raw, chat_template="none", train_on="all")["train"]) == ["c|", "sk: say|"]
    with pytest.raises(DataError, match="messages need a chat template"):
        opened(path, chat_template="none")


def test_parquet_and_a_folder(written: Callable[..., str], tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    rows = [{"messages": talk("ask", "say"), "prompt": None, "completion": None}, {"messages": None, "prompt": "p", "completion": "q"}]
    (tmp_path / "folder").mkdir()
    for name in ("a", "b"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "folder" / f"{name}.parquet")
    assert learnt(opened(str(tmp_path / "folder"))["train"]) == ["q|", "q|", "say|", "say|"]
    jsonl = written(*rows)
    assert learnt(opened(jsonl)["train"]) == learnt(opened(str(tmp_path / "folder" / "a.parquet"))["train"])


@pytest.mark.parametrize("kind, rows, wanted", [
    ("conversations", [{"text": "all of it"}, {"text": "more"}], ["ll of it|", "ore|"]),
    ("conversations", [{"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "say"}]}], ["say|"]),
    ("conversations", [{"text": "all", "messages": None}, {"text": None, "messages": talk("ask", "say")}], ["ll|", "say|"]),
    ("preferences", [{"prompt": "ask", "chosen": "yes", "rejected": "no"}], ["no|", "yes|"]),
    ("preferences", [{"chosen": talk("ask", "yes"), "rejected": talk("ask", "no")}], ["no|", "yes|"]),
    ("preferences", [{"prompt": talk("ask"), "chosen": talk("", "yes")[1:], "rejected": talk("", "no")[1:]}], ["no|", "yes|"]),
], ids=["text", "sharegpt", "mixed", "pairs", "pairs of messages", "pairs after messages"])  # fmt: skip
def test_parquet_of_every_form(kind: str, rows: list[dict[str, Any]], wanted: list[str], tmp_path: Path, written: Callable[..., str]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    data = opened(str(tmp_path / "rows.parquet"), kind, seq_len=160)["train"]
    assert learnt(data) == wanted == learnt(opened(written(*rows), kind, seq_len=160)["train"])
    assert (SHAREGPT in data.describe()) == ("conversations" in rows[0])
    bad = [*rows, dict.fromkeys(rows[0])]
    parquet.write_table(pyarrow.Table.from_pylist(bad), tmp_path / "bad.parquet")
    statistics = opened(str(tmp_path / "bad.parquet"), kind, seq_len=160)["train"].sets[0].statistics
    assert statistics["malformed"] == 1 and f"bad.parquet, line {len(rows)}," in statistics["malformed_first"][0]


GOOD = {"messages": talk("ask", "say")}
BAD = [
    ({"messages": []}, "empty, not a list"),
    ({"messages": "hello"}, "str, not a list"),
    ({"messages": [{"content": "x"}]}, "message 1 of 'messages' has no role"),
    ({"messages": [{"role": "user"}]}, "no content"),
    ({"messages": [{"role": "user", "content": 3}]}, "int, not text"),
    ({"conversations": [{"from": "human"}]}, "no from and value"),
    ({"prompt": "x"}, "no messages"),
    ({"prompt": "x", "chosen": "y", "rejected": "z"}, "set --objective dpo"),
    ({"other": 1}, "no messages"),
    ({"prompt": "x", "completion": 4}, "'completion' is int"),
    ({"messages": talk("a\ud800", "b")}, "surrogate"),
    ("{broken", "broken JSON"),
    ("[1]", "no key"),
]


@pytest.mark.parametrize("row, said", BAD, ids=[said for _, said in BAD])
def test_bad_rows_are_counted_and_named(row: Any, said: str, written: Callable[..., str]) -> None:
    path = written(GOOD, row, GOOD)
    statistics = opened(path)["train"].sets[0].statistics
    assert statistics["malformed"] == 1 and said in statistics["malformed_first"][0] and "line 2, byte" in statistics["malformed_first"][0]
    with pytest.raises(DataError, match="line 2"):
        opened(path, on_bad="error")
    with pytest.raises(DataError, match="11 of 12 documents are malformed"):
        opened(written(GOOD, *[row] * 11, name="many.jsonl"))
    with pytest.raises(DataError, match="no text is left"):
        opened(written(row, name="only.jsonl"))


@pytest.mark.parametrize("row, said", [
    ({"messages": talk("ask")}, "no message of the assistant"),
    ({"prompt": talk("ask", "say"), "completion": talk("more")}, "the assistant says nothing"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}, "no token of the conversation would be learnt"),
], ids=range(3))  # fmt: skip
def test_a_row_of_which_nothing_is_learnt_is_an_error_whatever_may_be_malformed(row: Any, said: str, written: Callable[..., str]) -> None:
    rows = [{"messages": talk(f"q{n}", f"a{n}")} for n in range(200)]
    path = written(*rows[:120], row, *rows[120:])
    for _ in range(2):  # nothing was kept of the first time that would let a second one pass
        with pytest.raises(DataError, match=rf"talk\.jsonl, line 121, byte \d+: .*{said}.*mend the row"):
            opened(path, bad_limit=1.0)
    assert len(learnt(opened(path, train_on="all")["train"])) == 201


def test_a_template_that_masks_nothing_names_the_row(written: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "never.jinja").write_text("{% for m in messages %}{{ m.role }}{{ m.content }}{{ eos_token }}{% if m.role == 'model' %}"
                                          "{% generation %}x{% endgeneration %}{% endif %}{% endfor %}")  # fmt: skip
    with pytest.raises(DataError, match=r"line 1.*1 messages of the assistant, and the template marks 0"):
        opened(written(GOOD), chat_template=str(tmp_path / "never.jinja"))
    with pytest.raises(DataError, match=r"line 2.*marks 0"):
        opened(written({"text": "fine"}, GOOD), chat_template=str(tmp_path / "never.jinja"), bad_limit=1.0)


def test_too_long_conversations_are_cut_after_an_answer_or_left_out(written: Callable[..., str]) -> None:
    long, endless = talk("ask", "say", "more", "x" * 80), talk("y" * 90, "say")
    path = written({"messages": long}, {"messages": endless}, GOOD, {"prompt": "p" * 80, "completion": "c"})
    data = opened(path)["train"]
    assert learnt(data) == ["say|", "say|"] and data.remarks() == {CUT: 1, TOO_LONG: 2}
    assert f"1 {CUT}" in data.describe() and f"2 {TOO_LONG}" in data.describe()
    assert opened(path, train_on="completion")["train"].remarks() == {TOO_LONG: 3}  # another turn would be another completion


def test_a_text_that_is_too_long_is_left_out_and_counted(written: Callable[..., str], tmp_path: Path) -> None:
    """It has no border of messages to be cut at. A file of text among the conversations is no row, and is cut as text is."""
    path = written({"text": "x" * 150}, {"text": "y" * 62 + "z"}, GOOD)  # the second fills a row, with what ends it
    data = opened(path)["train"]
    assert learnt(data) == ["say|", "y" * 61 + "z|"] and data.remarks() == {TOO_LONG: 1} and f"1 {TOO_LONG}" in data.describe()
    raw = written({"prompt": "", "completion": "x" * 150}, {"prompt": "b", "completion": "c"}, name="raw.jsonl")
    assert opened(raw, chat_template="none")["train"].remarks() == {TOO_LONG: 1}
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "book.txt").write_text("x" * 150)
    mixed = opened(str(tmp_path / "mixed"))["train"]
    assert len(mixed) == 3 and mixed.remarks() == {}


@pytest.mark.parametrize("packing", ["concat", "next_fit", "first_fit", "best_fit", "none"])
def test_conversations_stay_whole_and_apart(packing: str, written: Callable[..., str]) -> None:
    rows = [{"messages": talk("q" * (n % 7), "a" * (1 + n % 11))} for n in range(40)]
    data = opened(written(*rows), packing=packing)["train"]
    documents = 0
    for batch in data.in_sequence(4):
        assert batch.doc_ids is not None and batch.labels is not None and batch.position_ids is not None
        for row in range(batch.shape[0]):
            for document in range(int(batch.doc_ids[row].max()) + 1):
                at = (batch.doc_ids[row] == document).nonzero()[:, 0]
                ids, labels = batch.input_ids[row, at], batch.labels[row, at]
                documents += 1
                assert data.tokenizer.decode(ids.tolist()).startswith("User:\n") and ids[-1] == data.tokenizer.eos_id
                assert batch.position_ids[row, at].tolist() == list(range(len(at)))
                scored = labels != IGNORE
                assert not scored[-1] and (labels[:-1][scored[:-1]] == ids[1:][scored[:-1]]).all() and scored.any()
                assert set(labels[scored].tolist()) == {ord("a"), data.tokenizer.eos_id}
    assert documents == 40


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return all((a.input_ids == b.input_ids).all() and (a.labels == b.labels).all() for a, b in zip(ours, theirs, strict=True))


def test_order_is_a_function_of_the_step_and_a_second_start_sees_the_same(written: Callable[..., str]) -> None:
    path = written(*[{"messages": talk(f"q{n}", f"a{n}")} for n in range(50)])
    one, two = (opened(path, packing="none", seq_len=48)["train"] for _ in range(2))
    assert one.fingerprint() == two.fingerprint()
    plan = BatchPlan(seed=3, global_batch_size=8, steps=6)
    whole = [micro for micro, _ in one.batches(0, plan)]
    assert all(same(a, b) for a, (b, _) in zip(whole[4:], two.batches(4, BatchPlan(seed=3, global_batch_size=8, steps=2))))
    for rank in range(2):  # two processes with two micro-batches each see the rows of one
        part = [micro for micro, _ in two.batches(0, BatchPlan(seed=3, global_batch_size=8, accumulation=2, rank=rank, world_size=2, steps=6))]
        for (together,), (first, second) in zip(whole, part):
            assert same([together.rows(4 * rank, 4 * rank + 2), together.rows(4 * rank + 2, 4 * rank + 4)], [first, second])
    for keys in ({"train_on": "all"}, {"chat_template": "chatml"}):
        assert opened(path, packing="none", seq_len=48 + 64 * ("chat_template" in keys), **keys)["train"].fingerprint() != one.fingerprint()


def test_held_out_conversations_are_whole_ones(written: Callable[..., str]) -> None:
    rows = [{"messages": talk(f"q{n}", f"a{n}")} for n in range(200)]
    splits = opened(written(*rows), validation_fraction=0.2, test_fraction=0.1)
    said = {name: set(learnt(data)) for name, data in splits.items()}
    assert sum(map(len, said.values())) == 200 and 20 < len(said["validation"]) < 60 and 5 < len(said["test"]) < 40
    few = opened(written(*rows[:30], name="few.jsonl"), validation_fraction=0.4)  # too few to cut texts whole by, and whole all the same
    assert sorted([*learnt(few["train"]), *learnt(few["validation"])]) == sorted(f"a{n}|" for n in range(30))
    other = written({"messages": talk("other", "one")}, name="other.jsonl")
    assert learnt(opened(written(*rows), validation_path=other)["validation"]) == ["one|"]


def test_a_tokenizer_is_trained_on_what_is_said(written: Callable[..., str]) -> None:
    path = written(*[{"messages": talk("the wheel turned", "the thread ran on")}] * 30)
    splits = splits_of(DataSettings(path=path, dataset_class="conversations", seq_len=64), TokenizerSettings(name="bpe", vocab_size=300))
    made = splits["train"].tokenizer
    assert made is not None and made.kind == "bpe" and made.chat_template is not None and len(made.encode("the wheel turned")) < 10


@pytest.mark.parametrize("keys", [{"streaming": True}, {"transforms": ["x.py:f"]}, {"deduplicate": "exact"}, {"minimum_characters": 3},
                                  {"chat_template": "chatlm"}], ids=str)  # fmt: skip
def test_keys_of_text_are_refused(keys: dict[str, Any], written: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(keys))):
        opened(written(GOOD), **keys)


def test_text_says_how_conversations_are_read(written: Callable[..., str]) -> None:
    with pytest.raises((DataError, InputError), match="--objective sft"):
        splits_of(DataSettings(path=written(GOOD)), BYTES)


def test_a_damaged_mask_is_found(written: Callable[..., str]) -> None:
    path = written(*[GOOD] * 5)
    tokens = opened(path)["train"].sets[0]
    (mask,) = tokens.folder.glob("*.mask")
    mask.write_bytes(bytes(reversed(mask.read_bytes())))
    with pytest.raises(DataError, match="checksum"):
        tokens.verify()
    mask.write_bytes(b"")
    with pytest.raises(DataError, match=r"\.mask: 0 bytes"):
        opened(path)


# ---- preferences ----

PAIRS = [
    ({"prompt": "ask", "chosen": "yes", "rejected": "no"}, ["yes|", "no|"]),
    ({"prompt": talk("ask"), "chosen": talk("", "yes")[1:], "rejected": talk("", "no")[1:]}, ["yes|", "no|"]),
    ({"chosen": talk("ask", "yes"), "rejected": talk("ask", "no")}, ["yes|", "no|"]),
    ({"chosen": talk("a", "b", "c", "yes"), "rejected": talk("a", "b", "c", "no")}, ["yes|", "no|"]),  # the shared turn is a prompt
    ({"prompt": "ask", "chosen": talk("ask", "yes"), "rejected": talk("ask", "no")}, ["yes|", "no|"]),
]


@pytest.mark.parametrize("row, wanted", PAIRS, ids=range(len(PAIRS)))
def test_every_form_of_pair(row: dict[str, Any], wanted: list[str], written: Callable[..., str]) -> None:
    data = opened(written(row), "preferences", seq_len=160)["train"]
    assert learnt(data) == sorted(wanted) and isinstance(data, Preferences)


@pytest.mark.parametrize("row, said", [
    ({"prompt": "a", "chosen": "b"}, "no chosen and rejected"),
    ({"messages": talk("a", "b")}, "set --objective sft for conversations"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
    ({"chosen": "b", "rejected": "c"}, "texts without a prompt"),
    ({"chosen": talk("a", "b"), "rejected": talk("c", "d")}, "different prompts"),
], ids=str)  # fmt: skip
def test_bad_pairs_are_named(row: dict[str, Any], said: str, written: Callable[..., str]) -> None:
    data = opened(written({"prompt": "ask", "chosen": "yes", "rejected": "no"}, row), "preferences", seq_len=160)["train"]
    assert said in data.sets[0].statistics["malformed_first"][0]


@pytest.mark.parametrize("packing", ["concat", "next_fit", "none"])
def test_a_row_holds_whole_pairs(packing: str, written: Callable[..., str]) -> None:
    rows = [{"prompt": f"q{n}", "chosen": f"{n} yes" + "!" * (n % 9), "rejected": f"{n} no"} for n in range(30)]
    long = {"prompt": "q", "chosen": "x" * 300, "rejected": "y"}
    data = opened(written(*rows, long), "preferences", seq_len=192, packing=packing)["train"]
    assert data.remarks() == {TOO_LONG: 1}
    seen = set()
    for batch in data.in_sequence(3):
        assert batch.segments is not None and batch.labels is not None and batch.doc_ids is not None
        assert batch.counts["pairs"] == sum(sum(run > 0 for run in row) for row in batch.segments) / 2
        for row in range(batch.shape[0]):
            said = [data.tokenizer.decode(batch.labels[row][(batch.doc_ids[row] == d) & (batch.labels[row] != IGNORE)].tolist())
                    for d in range(int(batch.doc_ids[row].max()) + 1)]  # fmt: skip
            for chosen, rejected in zip(said[::2], said[1::2], strict=True):
                assert "yes" in chosen and "no" in rejected and chosen.split()[0] == rejected.split()[0]
                seen.add(chosen.split()[0])
    assert len(seen) == 30
    padded = data.batch(np.array([0, 0]), np.array([0, -1]))
    assert padded.counts["pairs"] == data.batch(np.array([0]), np.array([0])).counts["pairs"]


# ---- looking at them ----


def test_the_verbs_of_data_show_the_mask(written: Callable[..., str]) -> None:
    path = written({"messages": talk("ask", "say")}, "{broken", {"messages": talk("ask", "x" * 600)})
    shown = command("data", "show", path, "--chat_template", "chatml", "--tokenizer", "byte")
    assert shown.returncode == 0, shown.stderr
    lines = [line.strip() for line in shown.stdout.splitlines()]
    assert lines[1] == r"'<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\n'" and lines[2] == "learnt  'say<|im_end|>'"
    told = command("data", "stats", path, "--tokenizer", "byte", "--seq_len", "512")
    assert f"1 {TOO_LONG}" in told.stdout and "malformed: 1" in told.stdout and "line 2, byte" in told.stdout
    checked = command("data", "check", path, "--tokenizer", "byte", "--seq_len", "512")
    assert checked.returncode == 0 and "1 conversation(s)" in checked.stdout
    pairs = written({"prompt": "ask", "chosen": "yes", "rejected": "no"}, name="pairs.jsonl")
    shown = command("data", "show", pairs, "--tokenizer", "byte")
    assert shown.stdout.count("learnt  ") == 2 and "'yes<|endoftext|>'" in shown.stdout
    everything = command("data", "show", path, "--train_on", "all", "--tokenizer", "byte")
    assert everything.stdout.count("learnt  ") == 1
    assert command("data", "show", written({"text": "plain"}, name="text.jsonl"), "--tokenizer", "byte").stdout.startswith("document 0: 6 tokens from 0")


def test_nothing_left_says_why(written: Callable[..., str]) -> None:
    with pytest.raises(InputError, match="longer than a row"):
        opened(written(GOOD), seq_len=8)


CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
MEANT_OTHERWISE = [
    ({"messages": [*talk("ask"), CALL]}, "tool_calls, which the chat template does not write"),
    ({"messages": talk("ask", "say"), "tools": [{"type": "function"}]}, "'tools' is not passed"),
    ({"messages": [*talk("ask"), {**talk("", "say")[1], "weight": 0}]}, "weight = 0"),
    ({"messages": [*talk("ask"), {**talk("", "say")[1], "train": False}]}, "train = False"),
    ({"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "say", "weight": 0}]}, "weight = 0"),
]


@pytest.mark.parametrize("row, said", MEANT_OTHERWISE, ids=range(len(MEANT_OTHERWISE)))
def test_what_would_be_read_otherwise_than_it_was_meant_is_refused(row: dict[str, Any], said: str, written: Callable[..., str]) -> None:
    """A call that the template leaves out would teach to say nothing; with one that writes calls the same row is good."""
    with pytest.raises(DataError, match=said):
        opened(written(row), on_bad="error")
    good = {"messages": talk("ask", "say"), "tools": [], "chat_template_kwargs": None}
    assert learnt(opened(written(good), on_bad="error")["train"]) == ["say|"]


# A template that writes calls; one that fails without them, as those do whose roles alternate but for calls and their results.
WRITES, STRICT = "", "{% if not m.tool_calls and not m.content %}{{ raise_exception('nothing said') }}{% endif %}"


@pytest.mark.parametrize("check", [WRITES, STRICT], ids=["writes", "strict"])
def test_a_template_that_writes_calls_takes_them(check: str, tmp_path: Path, written: Callable[..., str]) -> None:
    template = tmp_path / "calls.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}" + check + "{% generation %}{{ m.content }}"
                        "{% for c in m.tool_calls or [] %}!{{ c.function.name }}{% endfor %}{{ eos_token }}{% endgeneration %}{% else %}"
                        "{{ m.content }}{% endif %}{% endfor %}")  # fmt: skip
    data = opened(written({"messages": [*talk("ask"), CALL]}), on_bad="error", chat_template=str(template))["train"]
    assert learnt(data) == ["!f|"]


def test_a_completion_of_several_turns_is_learnt_whole(written: Callable[..., str]) -> None:
    row = {"prompt": talk("ask", "one", "two"), "completion": talk("", "say", "more", "end")[1:]}
    assert learnt(opened(written(row), train_on="completion", seq_len=128)["train"]) == ["say|end|"]
    assert learnt(opened(written({"messages": talk("ask", "say", "more", "end")}), train_on="completion", seq_len=128)["train"]) == ["end|"]


def test_prompts_of_preferences_are_not_learnt(written: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match="answers alone"):
        opened(written({"prompt": "ask", "chosen": "yes", "rejected": "no"}), "preferences", train_on="all")
