"""llama.cpp itself, through the xllamacpp package, as the judge of .gguf files: plain fp32 computation on one thread."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


class LlamaCpp:
    """A model loaded by llama.cpp."""

    def __init__(self, path: Path, context: int = 256) -> None:
        library = pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
        options = library.CommonParams()
        options.model.path = str(path)
        options.n_ctx, options.n_parallel, options.port = context, 1, 0
        options.n_gpu_layers, options.warmup, options.fit_params, options.verbosity = 0, False, False, 0
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
        options.cache_type_k = options.cache_type_v = library.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = library.Server(options)

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._server.listening_address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text in which nothing is special."""
        return self._ask("/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"]

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The likeliest token each time; an id that ends a document ends it."""
        asked = {"prompt": [int(i) for i in prompt], "n_predict": count, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        return self._ask("/completion", asked)["tokens"]

    def next(self, prompt: Sequence[int], count: int = 5) -> dict[int, float]:
        """The likeliest ids after a prompt and their log-probabilities; none where the likeliest is half a character."""
        asked = {"prompt": [int(i) for i in prompt], "n_predict": 1, "temperature": 0, "n_probs": count, "cache_prompt": False}
        answer = self._server.handle_completions(asked)
        assert "choices" in answer, answer
        found = (answer["choices"][0]["logprobs"] or {}).get("content", [])
        return {one["id"]: one["logprob"] for token in found for one in token["top_logprobs"]}
