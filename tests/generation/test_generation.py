"""Sampling and cached decoding: options do what they say, rows do not disturb one another, text comes out whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from treadle.data.batch import Batch
from treadle.errors import ConfigError, InputError
from treadle.generation.decode import generate_text
from treadle.generation.sampling import Sampling, next_ids
from treadle.generation.session import Session
from treadle.models.base import build
from treadle.text.base import Tokenizer

GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    return build("transformer", vocab_size=256, hidden_size=32, num_layers=2, num_heads=2, initializer_range=0.3).eval()


def draw(logits: list[float], count: int = 400, **options: float) -> set[int]:
    batch = torch.tensor([logits]).repeat(count, 1)
    seen = torch.zeros_like(batch, dtype=torch.bool)
    return set(next_ids(batch, seen, Sampling(**options), torch.Generator().manual_seed(1)).tolist())  # type: ignore[arg-type]


def test_limits() -> None:
    logits = [3.0, 2.0, 1.0, 0.0, -1.0]
    assert draw(logits, top_k=0, top_p=1.0) == {0, 1, 2, 3, 4}
    assert draw(logits, top_k=2, top_p=1.0) == {0, 1}
    assert draw(logits, top_k=0, top_p=0.6) == {0}  # p(0) = .64 is enough
    assert draw(logits, top_k=0, top_p=0.8) == {0, 1}
    assert draw(logits, temperature=0) == {0}
    assert draw(logits, temperature=0.05, top_k=0, top_p=1.0) == {0}
    assert all(draw(logits, temperature=cold) == {0} for cold in (1e-6, 1e-45, 1e-320))  # no division by next to nothing


def test_frequencies_are_the_softmax() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0]]).repeat(20_000, 1)
    ids = next_ids(logits, torch.zeros_like(logits, dtype=torch.bool), Sampling(1.0, 0, 1.0), GENERATOR)
    share = torch.bincount(ids, minlength=3) / 20_000
    torch.testing.assert_close(share, logits[0].softmax(0), atol=0.015, rtol=0)


def test_repetition_penalty_lowers_seen_tokens_of_either_sign() -> None:
    logits, seen = torch.tensor([[2.0, 1.5, -1.0, -1.5]]), torch.tensor([[True, False, True, False]])
    greedy = Sampling(0.0, repetition_penalty=2.0)
    assert next_ids(logits, seen, greedy, GENERATOR).tolist() == [1]
    assert next_ids(-logits, ~seen, Sampling(0.0, repetition_penalty=3.0), GENERATOR).tolist() == [2]


def test_greedy_is_the_argmax_of_the_full_forward(model) -> None:  # type: ignore[no-untyped-def]
    ids = torch.randint(0, 256, (2, 5))
    out = model.generate(ids, 12, temperature=0)
    assert out.shape == (2, 17) and torch.equal(out[:, :5], ids)
    logits = model(Batch.from_ids(out)).logits
    assert torch.equal(logits[:, 4:-1].argmax(-1), out[:, 5:])


def test_a_seed_fixes_the_text(model) -> None:  # type: ignore[no-untyped-def]
    one, two, other = (model.generate([1, 2, 3], 20, seed=s) for s in (5, 5, 6))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_left_padding_changes_nothing(model) -> None:  # type: ignore[no-untyped-def]
    prompts = [[5, 6, 7, 8], [9, 10]]
    ids, mask = torch.tensor([prompts[0], [0, 0, *prompts[1]]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    together = model.generate(ids, 8, temperature=0, attention_mask=mask, repetition_penalty=1.3)
    for row, prompt in enumerate(prompts):
        alone = model.generate([prompt], 8, temperature=0, repetition_penalty=1.3)
        assert together[row, 4:].tolist() == alone[0, len(prompt) :].tolist()


def test_eos_ends_rows_and_fills_them(model) -> None:  # type: ignore[no-untyped-def]
    ids = torch.randint(0, 256, (3, 4), generator=torch.Generator().manual_seed(2))
    free = model.generate(ids, 30, temperature=0)
    eos = int(free[0, 8])
    out = model.generate(ids, 30, temperature=0, eos_id=eos)
    for row in range(3):
        ended = False
        for position in range(4, out.shape[1]):
            assert out[row, position] == (eos if ended else free[row, position])
            ended = ended or int(out[row, position]) == eos
    assert model.generate(ids, 30, temperature=0).shape[1] == 34  # no stop unless asked


@pytest.mark.parametrize(
    ("ids", "options", "says"),
    [
        ([], {}, "empty"),
        ([300], {}, "outside"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"top_k": -1}, "top_k"),
        ([1], {"repetition_penalty": 0.0}, "repetition_penalty"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens"),
    ],
)
def test_bad_options(model, ids: list[int], options: dict, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=says):
        model.generate(ids, **options)


def test_learned_positions_end_with_a_clear_error() -> None:
    model = build(
        "transformer",
        vocab_size=256,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        style="gpt2",
        max_position_embeddings=8,
    )
    assert model.generate([1, 2], 6).shape == (1, 8)
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        model.generate([1, 2], 9)


def test_a_full_state_says_so(model) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=r"new_state\(batch_size, max_len=5\)"), torch.no_grad():
        model(Batch.from_ids([[1, 2, 3, 4, 5]]), state=model.new_state(1, 4))


def test_text_streams_in_whole_characters(model) -> None:  # type: ignore[no-untyped-def]
    tokenizer = Tokenizer.load("byte")
    pieces: list[str] = []
    text = generate_text(model, tokenizer, "né", 60, on_text=pieces.append, seed=3, use_eos=False)
    assert "".join(pieces) == text and len(pieces) > 1
    assert generate_text(model, tokenizer, "", 5) is not None  # an empty prompt starts a document
    stop = text[4:6]
    cut = generate_text(model, tokenizer, "né", 60, seed=3, stop=stop, use_eos=False)
    assert cut == text[: text.index(stop)]


def session(model, **keys) -> Session:  # type: ignore[no-untyped-def]
    return Session(model, Tokenizer.load("byte"), Sampling(), 10, **keys)


def test_interactive_commands(model) -> None:  # type: ignore[no-untyped-def]
    lines = iter(
        [
            "/temp 0.5",
            "/topk 7",
            "/topp 0.5",
            "/max 3",
            "/nonsense",
            "/temp x",
            "/topp 7",
            "/help",
            "hello",
            "/greedy",
            "/quit",
        ]
    )
    out: list[str] = []
    made = session(model)
    made.interactive(lambda prompt: next(lines), out.append)
    text = "".join(out)
    assert made.sampling == Sampling(0.0, 7, 0.5) and made.max_new_tokens == 3
    assert "hello" in text and "/nonsense is no command" in text and "needs a number" in text and "top_p = 7" in text
    made.interactive(lambda prompt: (_ for _ in ()).throw(EOFError), out.append)  # the end of the input ends it


def test_what_is_refused_echoes_no_prompt() -> None:
    """Whether it is seen at the prompt or only in the model: nothing is on stdout but what was begun."""
    small = build("transformer", vocab_size=256, hidden_size=32, num_layers=1, num_heads=2, style="gpt2", max_position_embeddings=16).eval()
    out: list[str] = []
    for prompt, keys in (("much too long for it " * 4, {}), ("guess", {"speculative": "guesses"}), ("weights", {"weights": "int3"})):
        with pytest.raises(ConfigError):
            session(small, **keys).write_on(prompt, 0, out.append)
        with pytest.raises(ConfigError):
            session(small, **keys).respond(prompt, 0, out.append)
    assert out == []
    session(small).write_on("fits", 0, out.append)
    assert "".join(out) == "fits" + session(small).say("fits")
    out.clear()
    session(small, stop="").write_on("nothing follows", 0, out.append)
    assert "".join(out) == "nothing follows"


def test_prompt_files(model, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    out: list[str] = []
    session(model).run_file(str(tmp_path / "p.txt"), str(tmp_path / "o.txt"), 2, out.append)
    assert "4 continuations" in out[0] and (tmp_path / "o.txt").read_text(errors="replace").count("one") >= 2
    with pytest.raises(InputError, match="does not exist"):
        session(model).run_file("nowhere", None, 1, out.append)
    with pytest.raises(InputError, match="cannot be written"):
        session(model).run_file(str(tmp_path / "p.txt"), str(tmp_path / "no" / "o.txt"), 1, out.append)
    small = build("transformer", vocab_size=256, hidden_size=32, num_layers=1, num_heads=2, style="gpt2", max_position_embeddings=16).eval()
    (tmp_path / "p.txt").write_text(f"one\n{'much too long for it ' * 4}\n")
    with pytest.raises(ConfigError, match="shorter prompt"):
        session(small).run_file(str(tmp_path / "p.txt"), str(tmp_path / "kept.txt"), 1, out.append)
    assert (tmp_path / "kept.txt").read_text(errors="replace").startswith("one")  # what was made before is not lost


def test_a_stop_text_is_never_shown_in_part(model) -> None:  # type: ignore[no-untyped-def]
    options = {"temperature": 0.0, "use_eos": False}
    whole = generate_text(model, Tokenizer.load("byte"), "ab", 24, **options)
    assert len(whole) > 8
    stop, pieces = whole[5:8], []
    text = generate_text(model, Tokenizer.load("byte"), "ab", 24, stop=stop, on_text=pieces.append, **options)
    assert text == whole[: whole.index(stop)] == "".join(pieces)


def test_positions_are_counted_before_the_first_token() -> None:
    small = build("transformer", vocab_size=256, hidden_size=32, num_layers=1, num_heads=2, style="gpt2", max_position_embeddings=16).eval()
    seen: list[torch.Tensor] = []
    with pytest.raises(ConfigError, match="at most 14 "):
        small.generate([1, 2, 3], 15, on_ids=seen.append)
    assert seen == [] and small.generate([1, 2, 3], 14).shape == (1, 17)
    assert small.generate([[1, 2, 3], [4]], 14).shape == (2, 17)
    ids: list[int] = []
    generate_text(small, Tokenizer.load("byte"), "abc", 100, use_eos=False, on_text=ids.append)  # ends where the positions do
