"""Models of the Hugging Face hub, through huggingface_hub and its cache. Files of data alone are fetched, never code."""

from __future__ import annotations

import re
from pathlib import Path

from treadle.errors import InputError, MissingExtra

PREFIX = "hf:"  # makes any name a hub name
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LOCAL = ("runs", "recipes", "data")  # first parts of names that mean folders here, also where there are none yet
WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def is_hub_name(name: str) -> bool:
    """OWNER/NAME where no folder OWNER is here, or hf:NAME."""
    if name.startswith(PREFIX):
        return True
    owner = name.partition("/")[0]
    return bool(NAME.fullmatch(name)) and owner not in LOCAL and not Path(owner).exists() and not name.endswith(".gguf")


def fetched(name: str, revision: str | None = None) -> Path:
    """The folder of a model in the cache, downloaded where it is not there yet. InputError in one line: offline and not
    cached, no such name or revision, or no access. MissingExtra without huggingface_hub."""
    name = name.removeprefix(PREFIX)
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError:
        raise MissingExtra(f"{name} is no folder here; reading it from the Hugging Face hub", "hf") from None
    here = f"there is no folder {name} here, and"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=WANTED))
    except GatedRepoError:
        raise InputError(f"{here} the hub gives {name} only to those who accepted its terms; accept them on its page, then: hf auth "
                         "login") from None  # fmt: skip
    except RevisionNotFoundError:
        raise InputError(f"{here} the hub's {name} has no revision {revision!r}; leave it out, or give a branch, tag or commit") from None
    except RepositoryNotFoundError:
        raise InputError(f"{here} the hub has none (or only with a login: hf auth login); give a folder, a run or OWNER/NAME") from None
    except (LocalEntryNotFoundError, OSError, ValueError) as problem:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        if isinstance(problem, ValueError) and not isinstance(problem, LocalEntryNotFoundError):  # a name the hub cannot have
            raise InputError(f"{here} {name!r} is no name of the hub; give a folder, a run or OWNER/NAME") from None
        raise InputError(f"{here} {why} and {name} is not in its cache ({constants.HF_HUB_CACHE}); fetch it once with a connection: "
                         f"hf download {name}, or give a folder") from None  # fmt: skip
