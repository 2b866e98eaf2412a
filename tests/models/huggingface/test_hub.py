"""Models by their hub names, with a hub that answers: what is asked of it, and what each of its refusals says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

import treadle
from tests.models.huggingface.families import written
from treadle.errors import InputError
from treadle.models.huggingface.hub import WANTED, fetched


def refusal(kind: type[Exception]) -> Exception:
    """As the library raises it for an answer of the hub."""
    if issubclass(kind, errors.HfHubHTTPError):
        return kind("refused", response=SimpleNamespace(headers={}, request=None, status_code=403))  # type: ignore[call-arg]
    return kind("refused")


@pytest.fixture()
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A hub in place of the network: `answer` is a folder or what is raised, `asked` what it was asked."""
    made = SimpleNamespace(answer=None, asked=[])

    def snapshot_download(name: str, **keys: Any) -> str:
        made.asked.append((name, keys))
        if isinstance(made.answer, Exception):
            raise made.answer
        return str(made.answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return made


def test_a_model_is_downloaded_by_its_name_and_revision(hub: Any) -> None:
    hub.answer = written("qwen2")[1]
    for name, revision in (("owner/small", None), ("hf:owner/small", None), ("owner/small@v2", "v2")):
        assert treadle.from_pretrained(name).config.huggingface_family == "qwen2"
        assert hub.asked.pop() == ("owner/small", {"revision": revision, "allow_patterns": WANTED})
    assert fetched("owner/small") == Path(hub.answer)
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in WANTED)  # no code, and nothing that is run when it is read


@pytest.mark.parametrize("kind, name, said", [
    (errors.GatedRepoError, "owner/small", r"only to those who accepted its terms; accept them on its page, then: hf auth login"),
    (errors.RevisionNotFoundError, "owner/small@v9", r"owner/small has no revision 'v9'; leave it out, or give a branch, tag or commit"),
    (errors.RepositoryNotFoundError, "owner/small", r"the hub has none \(or only with a login: hf auth login\)"),
    (errors.LocalEntryNotFoundError, "owner/small", r"the hub cannot be reached and owner/small is not in its cache .*hf download owner/small"),
    (ConnectionError, "owner/small", r"the hub cannot be reached"),
    (errors.HFValidationError, "owner/small", r"is no name of the hub"),
], ids=["gated", "revision", "repository", "not cached", "no network", "no name"])  # fmt: skip
def test_each_refusal_says_what_to_do_in_one_line(hub: Any, kind: type[Exception], name: str, said: str) -> None:
    hub.answer = refusal(kind)
    with pytest.raises(InputError, match=said) as caught:
        treadle.from_pretrained(name)
    assert str(caught.value).startswith("there is no folder owner/small here, and") and "\n" not in str(caught.value)
    assert len(hub.asked) == 1
