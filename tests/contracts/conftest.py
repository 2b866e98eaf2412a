"""The contract tests run over every registered architecture, and print which contracts a declared capability skips."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from treadle.data.batch import Batch
from treadle.models.base import Model, build_from
from treadle.models.catalogue import MODELS
from treadle.models.encoder_decoder import EncoderDecoder

KINDS = ["block_sparse_attention", "linear_attention", "ssd", "hgrn", "retnet", "rwkv", "gated_deltanet"]
MIXER = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "state_size": 8, "low_rank_size": 4, "attention_block_size": 4,
         "global_tokens": 2}  # fmt: skip

# The small shapes under test; an architecture without one here fails, it is not left out. A list holds variants.
SHAPES: dict[str, list[dict[str, Any]]] = {
    "transformer": [
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "qk_norm": True},
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "style": "gpt2", "max_position_embeddings": 64},
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "style": "gpt2",
            "pre_norm": False,
            "tie_embeddings": False,
        },
        # Norms behind products that start at the usual .02 magnify last bits: with muon FSDP was 1.4e-3 from one process after
        # three steps. So these start at .2.
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "layer_types": ["sliding_attention", "full_attention"],
         "sliding_window": 5, "qk_norm": True, "post_norms": True, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
         "query_pre_attn_scalar": 5.0, "initializer_range": 0.2, "embedding_multiplier": 3.0, "rope_local_base_freq": 100.0, "gated_activation": "gelu_tanh"},
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 1, "layer_types": ["local", "full"], "sliding_window": 6,
         "qk_norm": True, "qk_norm_over": "projection", "pre_norm": False, "post_norms": True, "attention_bias": True, "mlp_bias": True,
         "partial_rotary_factor": 0.5, "initializer_range": 0.2, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "mlp": "relu2", "value_embeddings": True, "logit_softcap": 5.0, "token_shift": True},
        {**MIXER, "num_layers": 8, "num_kv_heads": 2, "layer_types": [*KINDS, "full_attention"]},
        *({**MIXER, "layer_types": [kind], "style": "gpt2" if index % 2 else "llama"} for index, kind in enumerate(KINDS)),
    ],
    "shc": [
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2},
        {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "routing": "cayley_mixture", "adaptive_rank": True, "rank_noise": 0.0,
         "stream_reduction": "learned"},
        {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "routing": "sinkhorn", "router_input": "mean", "num_streams": 3},
        {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "routing": "birkhoff", "latent_size": 24},
        {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "routing": "none", "qk_norm": True},
        {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_streams": 1},
    ],
    "hgrn_bit": [
        {"hidden_size": 32, "num_layers": 2, "convolution_size": 4, "num_heads": 2, "lower_bound": True},
        {"hidden_size": 32, "num_layers": 2, "output_gate": "hgrn", "expand_ratio": 2, "mlp_width": "matmulfree"},
        {"hidden_size": 32, "num_layers": 2, "ternary": False, "convolution_size": 3, "shared_convolution": True,
         "tie_embeddings": True, "initializer_range": 0.1},
    ],
    "hnet": [
        {"hidden_sizes": [32, 40], "num_blocks": [[1, 0, 1], [1]], "convolution_size": 4},
        {"hidden_sizes": [24, 24, 32], "num_blocks": [[1, 0, 1], [0, 0, 1], [1]], "ternary": False, "initializer_range": 0.1},
        {"hidden_sizes": [24, 32], "num_blocks": [[1, 0, 1], [2]], "token_mixers": ["hgrn_bit", ["attention", "ssm"]], "local_window": 6},
        {"hidden_sizes": [24, 32], "num_blocks": [[1, 0, 1], [2]], "token_mixers": [["attention", "hgrn"], "ssm"], "ternary": False,
         "initializer_range": 0.1},
    ],
    "inl": [
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "dynamics_controller_size": 16},
        {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "style": "gpt2", "max_position_embeddings": 64, "dynamics": "lite",
         "dynamics_placement": "post"},
    ],
    # Next-token training reaches no other head, so these have none; tests/collatz_tasks holds the whole model to the same.
    "collatz": [
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "stopping_head": False},
        {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "stopping_head": False, "causal": False},
    ],
    "encoder_decoder": [
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "source_length": 7},
        {"hidden_size": 32, "num_layers": 1, "encoder_layers": 3, "num_heads": 2, "source_length": 9, "qk_norm": True, "tie_embeddings": False},
    ],
    "ssm": [
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "local_window": 5},
        {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "local_window": 0, "num_streams": 1, "qk_norm": True},
        {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "feature_map": "none", "normalizer": False, "num_streams": 3},
    ],
}
CASES = [(name, number) for name in MODELS.names() for number in range(len(SHAPES.get(name, [{}])))]
# Models of one mixer alone; what takes seconds a case (several processes, resuming) sees each of them in the hybrid.
PURE = [("transformer", number) for number, shape in enumerate(SHAPES["transformer"]) if len(shape.get("layer_types", [])) == 1]
# For tests that are written with it, instead of the fixture's cases.
every_model_but_pure_mixers = pytest.mark.parametrize(
    "case", [case for case in CASES if case not in PURE], ids=lambda case: f"{case[0]}-{case[1]}", indirect=True
)
# The first shape of each model, the others with `make test-slow` and on the contract board: for what takes ten seconds a shape, and
# which another test of every shape stands beside.
first_shapes_are_usual = pytest.mark.parametrize(
    "case", [case if case[1] == 0 else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=[f"{name}-{number}" for name, number in CASES], indirect=True,
)  # fmt: skip


def _with_a_source(hidden: Any) -> Any:
    """The contracts' batches are tokens alone; in all of them an encoder-decoder reads this source, while it decodes with the
    first of them."""

    def read(model: Any, batch: Batch, state: Any = None) -> Any:
        if "source" not in batch.extras and (state is None or state.used == 0):
            ids = torch.arange(3, 3 + model.config.source_length, device=batch.device).expand(batch.shape[0], -1)
            batch = replace(batch, extras={**batch.extras, "source": ids})
        return hidden(model, batch, state)

    return read


EncoderDecoder.hidden = _with_a_source(EncoderDecoder.hidden)  # type: ignore[method-assign]


def make(name: str, number: int = 0, seed: int = 0, **more: Any) -> Model:
    assert name in SHAPES, f"add small shapes for {name} to tests/contracts/conftest.py"
    cls = MODELS.get(name)
    config = cls.Config.with_preset(None, **{"vocab_size": 61, **SHAPES[name][number], **more})
    return build_from(cls, config, seed)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[str, int]:
    return request.param


@pytest.fixture()
def model(case: tuple[str, int]) -> Model:
    return make(*case).eval()


def needs(model: Model, capability: str) -> None:
    """Skips a contract only by a declared capability."""
    if not getattr(model.capabilities, capability):
        pytest.skip(f"{model.arch} declares {capability} = False")


def random_ids(rows: int, length: int, vocabulary: int = 61, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
