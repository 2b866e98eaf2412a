"""Decoding beside llama.cpp (the xllamacpp wheel): a Llama shape of 14M parameters with random weights, batch 1, one thread.

    .venv-peers/bin/python -m bench.peers.llama_cpp          # made by python -m bench.peers.environment

The same weights in both: ours as fp32, bf16, int8 and int4 linears, llama.cpp's as F32, BF16, Q8_0 and Q4_0 GGUF files written here. It
tokenises nothing: the prompt and the 256 byte tokens are numbers. CPU seconds of the process over 128 greedy tokens after a prompt of
32, in turns, with the sampling, detokenising and JSON of its server counted as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.peers import environment

SHAPE = {"hidden_size": 384, "num_layers": 7, "num_heads": 6, "vocab_size": 2048, "tie_embeddings": False}
FORMATS = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
PROMPT, CONTEXT = 32, 512


def write_gguf(model: Any, path: Path, kind: str) -> None:
    """The model as a GGUF file of the llama architecture, matrices in `kind`, norms in F32."""
    import gguf
    import numpy as np

    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    weights = {name: tensor.detach().float().numpy() for name, tensor in model.named_weights().items()}
    writer.add_feed_forward_length(weights["layers.0.mlp.gate.weight"].shape[0])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{number}" for number in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["t 0"])
    names = {"embedding.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "head.weight": "output.weight"}
    parts = {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm", "attention.query": "attn_q", "attention.key": "attn_k", "attention.value": "attn_v",
             "attention.out": "attn_output", "mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down"}  # fmt: skip
    chosen = gguf.GGMLQuantizationType[kind]
    for name, values in weights.items():
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            name = f"blk.{number}.{parts[rest.removesuffix('.weight')]}.weight"
        else:
            name = names[name]
        if values.ndim == 2 and kind != "F32":
            writer.add_tensor(name, gguf.quants.quantize(values, chosen), raw_dtype=chosen)
        else:
            writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def theirs(path: Path) -> Callable[[int], int]:
    """A function that generates so many tokens and returns how many it did."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = CONTEXT, 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_batch = params.n_ubatch = 64
    server = xllamacpp.Server(params)

    def run(count: int) -> int:
        answer = server.handle_completions({"prompt": list(range(100, 100 + PROMPT)), "n_predict": count, "temperature": 0.0, "ignore_eos": True,
                                            "cache_prompt": False, "max_tokens": count})  # fmt: skip
        answer = answer if isinstance(answer, dict) else json.loads(answer)
        if "usage" not in answer:
            raise RuntimeError(str(answer)[:300])
        return int(answer["usage"]["completion_tokens"])

    return run


def compare(quick: bool) -> dict[str, Any]:
    """In this process, which has xllamacpp: CPU ms a token of both in each format, and theirs over ours."""
    import torch

    import treadle

    torch.set_num_threads(1)
    model = treadle.build("transformer", **SHAPE).eval()
    prompt, values = torch.arange(100, 100 + PROMPT)[None], {}
    counts = (8, 24) if quick else (8, 136)
    for ours, kind in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path, kind)
            other = theirs(path)
            ways: dict[str, Callable[[int], Any]] = {
                "ours": lambda count, ours=ours: treadle_generate(model, prompt, count, ours), "theirs": other
            }
            taken: dict[str, list[float]] = {name: [] for name in ways}
            for way in ways.values():
                way(counts[0])
            for _ in range(1 if quick else 5):
                for name, way in ways.items():
                    used = []
                    for count in counts:
                        begun = time.process_time()
                        way(count)
                        used.append(time.process_time() - begun)
                    taken[name].append((used[1] - used[0]) / (counts[1] - counts[0]) * 1e3)  # the prompt counts in both: out
            mine, other_ms = statistics.median(taken["ours"]), statistics.median(taken["theirs"])
            values |= {f"{ours}, ours: CPU ms a token": mine, f"{ours}, llama.cpp {kind}: CPU ms a token": other_ms,
                       f"{ours}: llama.cpp over ours": statistics.median(b / a for a, b in zip(taken["ours"], taken["theirs"]))}  # fmt: skip
            del other
    return values


def treadle_generate(model: Any, prompt: Any, count: int, weights: str) -> Any:
    return model.generate(prompt, count, temperature=0.0, weights=weights)


def measure(quick: bool) -> dict[str, Any]:
    if environment.version("xllamacpp") is None:
        return {"llama_cpp": environment.missing("xllamacpp")}
    line = [environment.python(), "-m", "bench.peers.llama_cpp", "--json", *(["--quick"] if quick else [])]
    done = subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=900)
    if done.returncode:
        return {"llama_cpp": f"FAILED ({done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else done.returncode})"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    found = compare(given.quick)
    print(json.dumps(found) if given.json else "\n".join(f"{name}: {value:.3g}" for name, value in found.items()), flush=True)
    sys.stdout.flush()
    os._exit(0)  # the server's threads end slowly


if __name__ == "__main__":
    main()
