"""config.json <-> the keys of models/transformer.py, by the tables of tables.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treadle.errors import ConfigError
from treadle.layers.rope import SCALINGS
from treadle.layers.token_mixers import layer_types_of
from treadle.models.huggingface.tables import FAMILIES, ONLY, WITHOUT_EFFECT, Family
from treadle.models.transformer import TransformerConfig
from treadle.settings import shown

# Their names of activations -> ours; the last of equal ones is what is written.
ACTIVATIONS = {"swish": "silu", "silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu"}
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rope_local_base_freq",
             "original_max_position_embeddings")  # fmt: skip
WINDOW_KEYS = {
    "none": (),
    "every": ("sliding_window",),
    "after": ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    "pattern": ("sliding_window", "layer_types", "sliding_window_pattern", "_sliding_window_pattern"),
}
SLIDING, FULL = "sliding_attention", "full_attention"
# Of their keys that have one of ours, those whose null is ours too.
NULLABLE = ("num_key_value_heads", "head_dim", "n_inner", "final_logit_softcapping", "attn_logit_softcapping", "attention_dropout")
# Keys that matter only while training, which a family need not have.
TRAINING_ONLY = ("dropout", "attention_dropout", "initializer_range", "zero_init_residual")


def family_of(table: Mapping[str, Any], place: str) -> Family:
    """The family that config.json names; ConfigError for one that there is no table for, or that asks for code."""
    if table.get("auto_map"):
        raise ConfigError(f"{place}: auto_map = {shown(table['auto_map'])} asks for code from the folder, which is never run; use a "
                          "model of a family that treadle computes itself, or convert it")  # fmt: skip
    if table.get("quantization_config") is not None:
        raise ConfigError(f"{place}: quantization_config = {shown(table['quantization_config'])} is not computed; use the folder "
                          "with the weights in bf16 or fp32, or a .gguf file")  # fmt: skip
    name = table.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        text = "; of Gemma-3, the text model alone (Gemma3ForCausalLM)" if name == "gemma3" else ""
        raise ConfigError(f"{place}: model_type = {shown(name)} is not computed{text}; there is: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def keys_of(table: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The table of a config.json -> the keys of TransformerConfig. ConfigError names the key whose value is not computed."""
    try:
        return _keys_of(family_of(table, place), table, place)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as problem:  # values of another kind than their key's
        raise ConfigError(f"{place} is not sound: {problem}") from None


def _keys_of(family: Family, table: Mapping[str, Any], place: str) -> dict[str, Any]:
    full = {**family.defaults, **table}
    for theirs in family.keys:
        if full.get(theirs) is None and theirs not in NULLABLE:
            said = f"{theirs} = null" if theirs in full else f"there is no {theirs}"
            raise ConfigError(f"{place}: {said}; the model's shape needs it")
    found = {**family.always, "huggingface_family": family.model_type}
    found.update({ours: full[theirs] for theirs, ours in family.keys.items() if full.get(theirs) is not None})
    found.update(_activation(family, full, place))
    handled = {*family.keys, family.activation, *(["hidden_act"] if family.activation == "hidden_activation" else [])}
    if family.always["style"] == "llama":
        found.update(_positions(family, full, place))
        found.update(_windows(family, full, place))
        handled |= {*ROPE_KEYS, *WINDOW_KEYS[family.windows]}
    if family.scaled_embedding and isinstance(full.get("hidden_size"), int):
        found["embedding_multiplier"] = float(abs(full["hidden_size"]) ** 0.5)
    _refuse_others(family, table, handled, place)
    if family.model_type == "gpt2" and full["embd_pdrop"] != full["resid_pdrop"]:
        raise _refused(place, "embd_pdrop", full["embd_pdrop"], f"give it the value of resid_pdrop, {full['resid_pdrop']}")
    return found


def _refused(place: str, key: str, value: Any, instead: str) -> ConfigError:
    return ConfigError(f"{place}: {key} = {shown(value)} is not computed; {instead}")


def _refuse_others(family: Family, table: Mapping[str, Any], handled: set[str], place: str) -> None:
    only = {**ONLY, **family.only}
    for key, value in table.items():
        if key in only:
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in only[key]):
                raise _refused(place, key, value, f"it would have to be {' or '.join(map(str, only[key]))}")
        elif key not in handled and key not in WITHOUT_EFFECT and key != "embd_pdrop" and value is not None:
            raise _refused(place, key, value, f"the family {family.model_type} has no such key here; if it changes nothing, "
                                              "take it out of config.json")  # fmt: skip


def _activation(family: Family, full: Mapping[str, Any], place: str) -> dict[str, Any]:
    value = full.get(family.activation)
    if value is None and family.activation == "hidden_activation":  # Gemma's first files
        value = "gelu_pytorch_tanh"
    if value not in ACTIVATIONS:
        raise _refused(place, family.activation, value, f"there is: {', '.join(ACTIVATIONS)}")
    return {"activation" if family.always["style"] == "gpt2" else "gated_activation": ACTIVATIONS[value]}


# ---- rotary positions: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` of those before ----


def _positions(family: Family, full: Mapping[str, Any], place: str) -> dict[str, Any]:
    written = full.get("rope_scaling") or full.get("rope_parameters") or {}
    if not isinstance(written, dict):
        raise _refused(place, "rope_scaling", written, "it would have to be a table")
    local: dict[str, Any] = {}
    if family.local_theta is not None:
        nested = full.get("rope_parameters") or {}
        theirs = dict(nested.get(SLIDING) or {}) if isinstance(nested, dict) else {}
        if theirs.get("rope_type", "default") != "default":
            raise _refused(place, f"rope_parameters.{SLIDING}", theirs, "only its base may differ")
        theta = theirs.get("rope_theta", full.get("rope_local_base_freq"))
        local = {"rope_local_base_freq": float(family.local_theta if theta is None else theta)}
        if not full.get("rope_scaling"):
            written = dict(nested.get(FULL) or {}) if isinstance(nested, dict) else {}
    elif full.get("rope_local_base_freq") is not None:
        raise _refused(place, "rope_local_base_freq", full["rope_local_base_freq"], f"the family {family.model_type} has none")
    scaling = {key: value for key, value in written.items() if value is not None}
    theta, share = scaling.pop("rope_theta", full["rope_theta"]), scaling.pop("partial_rotary_factor", full.get("partial_rotary_factor"))
    legacy = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", legacy)
    if share not in (None, 1, 1.0) and not family.partial_rotary:
        raise _refused(place, "partial_rotary_factor", share, f"the family {family.model_type} turns whole heads")
    found = {"rope_theta": float(theta), **local, **({} if share is None else {"partial_rotary_factor": float(share)})}
    if kind == "default":
        if scaling:
            raise _refused(place, f"rope_scaling.{next(iter(scaling))}", next(iter(scaling.values())), "rope_type default takes no such key")
        return found
    if kind not in family.rope_types:
        raise _refused(place, "rope_type", kind, f"of {family.model_type} there is: default, {', '.join(family.rope_types)}")
    return {**found, "rope_scaling": _scaling(kind, scaling, full)}


def _scaling(kind: str, scaling: dict[str, Any], full: Mapping[str, Any]) -> dict[str, Any]:
    """With what transformers fills in; what it does not read for this kind is left out."""
    length = full["max_position_embeddings"]
    if "original_max_position_embeddings" in SCALINGS[kind][0]:
        scaling.setdefault("original_max_position_embeddings", full.get("original_max_position_embeddings") or length)
        if kind == "yarn":
            scaling.setdefault("factor", length / scaling["original_max_position_embeddings"])
    else:
        scaling.pop("original_max_position_embeddings", None)
    return {"rope_type": kind, **scaling}


def _written_positions(config: TransformerConfig, family: Family) -> dict[str, Any]:
    """In the older spelling, which transformers 4 and 5 both read."""
    found: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling}
    if family.partial_rotary:
        found["partial_rotary_factor"] = config.partial_rotary_factor
    if family.local_theta is not None:
        local = config.rope_local_base_freq
        found["rope_local_base_freq"] = config.rope_theta if local is None else local
    return found


# ---- sliding windows ----


def _windows(family: Family, full: Mapping[str, Any], place: str) -> dict[str, Any]:
    window, count = full.get("sliding_window"), full.get("num_hidden_layers")
    if family.windows == "none" or not isinstance(count, int) or not 0 < count <= 4096:
        return {}
    if family.windows == "every":
        return {} if window is None else {"sliding_window": window, "layer_types": [SLIDING]}
    types = full.get("layer_types")
    if types is None and family.windows == "after":
        first = full["max_window_layers"] if full["use_sliding_window"] and window is not None else count
        types = [FULL if index < first else SLIDING for index in range(count)]
    elif types is None:
        every = full.get("sliding_window_pattern") or full.get("_sliding_window_pattern") or family.pattern
        types = [SLIDING if (index + 1) % every else FULL for index in range(count)]
    if not isinstance(types, list) or len(types) != count or not set(types) <= {SLIDING, FULL}:
        raise _refused(place, "layer_types", types, f"it would have to name {FULL} or {SLIDING} for each of {count} layers")
    if SLIDING not in types:
        return {}
    if family.windows == "after" and not full["use_sliding_window"]:
        raise _refused(place, "use_sliding_window", False, f"layer_types has {SLIDING}")
    if window is None:
        raise _refused(place, "sliding_window", None, f"layer_types has {SLIDING}; say how many positions it sees")
    return {"sliding_window": window, "layer_types": types}


def _written_windows(config: TransformerConfig, family: Family) -> dict[str, Any]:
    types = layer_types_of(config.layer_types, config.num_layers)
    window = config.sliding_window if SLIDING in types else None
    if family.windows == "every":
        return {"sliding_window": window}
    if family.windows == "after":
        first = types.index(SLIDING) if SLIDING in types else len(types)
        return {"use_sliding_window": SLIDING in types, "sliding_window": window, "max_window_layers": first, "layer_types": types}
    if family.windows == "pattern":
        return {"sliding_window": window or 4096, "layer_types": types}
    return {}


# ---- the other way ----


def effective(config: TransformerConfig) -> dict[str, Any]:
    """The keys that decide what a model computes, with their defaults filled in; equal for models that compute the same."""
    found = config.model_dump()
    found.pop("huggingface_family")
    llama, types = config.style == "llama", layer_types_of(config.layer_types, config.num_layers)
    found.update(
        num_kv_heads=config.groups, head_dim=config.width_of_head, intermediate_size=config.inner, layer_types=types,
        attention_bias=config.attention_biases[0], attention_out_bias=config.attention_biases[1], mlp_bias=config.mlp_biases,
        query_pre_attn_scalar=float(config.query_pre_attn_scalar or config.width_of_head),
        sliding_window=config.sliding_window if SLIDING in types else None,
        qk_norm_over=config.qk_norm_over if config.qk_norm else None, mlp="gated" if config.gated else "plain",
    )  # fmt: skip
    idle = ["activation" if config.gated else "gated_activation"]
    idle += [] if llama else ["rope_theta", "rope_scaling", "partial_rotary_factor"]
    if not llama or SLIDING not in types:
        idle.append("rope_local_base_freq")
    elif found["rope_local_base_freq"] is None and config.rope_scaling is None:
        found["rope_local_base_freq"] = config.rope_theta
    return {key: None if key in idle else value for key, value in found.items()}


def described(config: TransformerConfig, family: Family) -> dict[str, Any]:
    """The table of a config.json of this family. ConfigError names our keys that it cannot hold."""
    own = effective(config)
    table: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    table.update({theirs: own[ours] for theirs, ours in family.keys.items()})
    scalar = table.get("query_pre_attn_scalar")
    if scalar is not None and scalar == int(scalar):
        table["query_pre_attn_scalar"] = int(scalar)  # transformers takes no other number
    activation = config.mlp_activation
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs != "gelu_pytorch_tanh"}
    if activation not in names:
        raise ConfigError(f"a {family.model_type} model cannot hold the activation {activation}")
    table[family.activation] = names[activation]
    if family.activation != "activation_function" and activation == "gelu_tanh":
        table[family.activation] = "gelu_pytorch_tanh"
    if family.always["style"] == "llama":
        table.update(_written_positions(config, family))
        table.update(_written_windows(config, family))
    else:
        table["embd_pdrop"] = table["resid_pdrop"]
    again = effective(TransformerConfig(**keys_of(table, "config.json")))
    other = [key for key, value in own.items() if again[key] != value and key not in TRAINING_ONLY]
    if other:
        raise ConfigError(f"a {family.model_type} model cannot hold " + ", ".join(f"{key} = {shown(own[key])}" for key in other[:4]))
    return {key: value for key, value in table.items() if value is not None or key in family.defaults}


def written(config: TransformerConfig) -> tuple[Family, dict[str, Any]]:
    """The family that holds a model, its own first, and the table of its config.json; ConfigError says what none can hold."""
    own = config.huggingface_family
    order = sorted(FAMILIES.values(), key=lambda family: family.model_type != own)
    problems = []
    for family in order:
        try:
            return family, described(config, family)
        except ConfigError as problem:
            problems.append(str(problem))
    raise ConfigError("no Hugging Face family holds this model: " + "; ".join(problems[:3]))
