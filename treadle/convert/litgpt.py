"""litgpt's YAML configurations of pretrain, finetune and finetune_lora (github.com/Lightning-AI/litgpt, config_hub).

What a file leaves out is at treadle's default, since litgpt's differ between its commands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from treadle.convert.reading import NO_KEY, Reading, listed
from treadle.errors import ConfigError
from treadle.foreign import LITGPT
from treadle.monitor.settings import FILE_SINKS, Sink
from treadle.training.settings import Optimizer

TRAIN = {
    "global_batch_size": "train.global_batch_size", "micro_batch_size": "train.per_device_train_batch_size",
    "epochs": "train.num_train_epochs", "max_steps": "train.max_steps", "max_seq_length": "data.seq_len", "max_norm": "optim.max_grad_norm",
    "min_lr": "optim.min_lr", "save_interval": "checkpoint.save_steps", "lr_warmup_steps": "optim.warmup_steps",
}  # fmt: skip
EVAL = {"interval": "eval.eval_steps", "max_new_tokens": "eval.sample_tokens", "initial_validation": "eval.eval_on_start"}
PRECISION = {"bf16": "bf16", "16": "fp16", "32": "fp32"}
SHAPE = {"n_layer": "num_layers", "n_head": "num_heads", "n_embd": "hidden_size", "n_query_groups": "num_kv_heads", "head_size": "head_dim",
         "intermediate_size": "intermediate_size", "rope_base": "rope_theta", "norm_eps": "norm_eps", "rotary_percentage": "partial_rotary_factor",
         "block_size": "max_position_embeddings", "norm_qk": "qk_norm", "attention_scores_scalar": "query_pre_attn_scalar",
         "attention_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}  # fmt: skip
# What model_config says that is no part of the shape, or what the file's other values lead to anyway.
NO_SHAPE = {"name", "hf_config", "padding_multiple", "rope_n_elem", "gelu_approximate", "norm_class_name", "mlp_class_name", "bias", "attn_bias"}
WHY_NO_SHAPE = {
    "vocab_size": "a model has as many tokens as its tokenizer: tokenizer.vocab_size",
    "padded_vocab_size": "a model has as many tokens as its tokenizer: tokenizer.vocab_size",
    "parallel_residual": "attention and MLP come one after the other",
    "shared_attention_norm": "attention and MLP come one after the other",
    "rotary_percentage": "with LayerNorm (style gpt2) positions are learned",
    "rope_base": "with LayerNorm (style gpt2) positions are learned",
    "lm_head_bias": "the head has no bias",
    "sliding_window_size": "model.sliding_window, for the blocks that model.layer_types calls sliding_attention",
    "rope_adjustments": "model.rope_scaling says it, in the words of Hugging Face",
    "scale_embeddings": "model.embedding_multiplier, with the number",
    "post_attention_norm": "model.post_norms, for both halves of a block",
    "post_mlp_norm": "model.post_norms, for both halves of a block",
}
NORMS, MLPS = ("RMSNorm", "LayerNorm"), ("LLaMAMLP", "GemmaMLP", "GptNeoxMLP")
ASKED = ("n_layer", "n_head", "n_query_groups", "n_embd", "intermediate_size")  # what a name alone does not tell
# lora_NAME = true -> the linear layers that get adapters.
LORA = {"query": ["query"], "key": ["key"], "value": ["value"], "projection": ["out"], "mlp": ["mlp.gate", "mlp.up", "mlp.down"]}
WHY = {
    "quantize": "adapter.base_precision = \"int8\" holds the frozen layers in a byte; nf4 and fp4 are not there",
    "access_token": "the environment's HF_TOKEN is read where a file is fetched",
    "num_nodes": "torchrun --nnodes N -m treadle train THIS.toml on each of them",
    "resume": "the same command goes on with its own run",
    "lora_head": "adapters are beside the linear layers of blocks",
    "final_validation": "the last step is always evaluated",
    "evaluate_example": "eval.sample_prompt is what samples begin with",
    "max_time": "stop it when you like; the same command goes on",
    "compiler": "train.torch_compile = \"auto\" compiles where that pays",
    "executors": "train.torch_compile = \"auto\" compiles where that pays",
    "ops": "nothing is chosen kernel by kernel; train.attention_backend names that of attention",
    "log": "log.report_to and log.project say where metrics go",
}  # fmt: skip


def is_config(table: dict[str, Any]) -> bool:
    """Whether a table is one of litgpt's."""
    train = table.get("train")
    inner = set(train) if isinstance(train, dict) else set()
    return bool(LITGPT & inner) or any(
        isinstance(table.get(key), dict) and "class_path" in table[key] for key in ("data", "optimizer")
    )


def read(table: dict[str, Any], path: Path) -> Reading:
    """A configuration as its file says it."""
    reading = Reading("litgpt")
    left = {str(key): value for key, value in table.items()}
    reading.put("run.run_name", path.stem)
    for name, key in (("seed", "run.seed"), ("out_dir", "run.output_dir"), ("lora_r", "adapter.lora_rank"), ("lora_alpha", "adapter.lora_alpha"),
                      ("lora_dropout", "adapter.lora_dropout")):  # fmt: skip
        value = left.pop(name, None)
        if value is not None and (name == "seed" or not name.startswith("lora") or table.get("lora_r")):
            reading.put(key, value, name)
    train = left.pop("train", None) or {}
    _train(reading, train, left.get("devices", 1), left.get("model_config"))
    _evaluation(reading, left.pop("eval", None) or {}, train)
    _optimizer(reading, left.pop("optimizer", None))
    _model(reading, left, train)
    _data(reading, left.pop("data", None))
    _machine(reading, left)
    _adapters(reading, left)
    for name, value in left.items():
        if value not in (None, False, "", [], {}):
            reading.leave(name, value, WHY.get(name, NO_KEY))
    return reading


def _train(reading: Reading, train: dict[str, Any], devices: Any, shape: Any) -> None:
    left = dict(train)
    for name, key in TRAIN.items():
        value = left.pop(name, None)
        if value is not None:
            reading.put(key, value, f"train.{name}")
    batch, micro = train.get("global_batch_size"), train.get("micro_batch_size")
    every = left.pop("log_interval", None)
    if every is not None:  # counted in forward passes of one device there, in steps here
        passes = max(1, batch // (micro * (devices if isinstance(devices, int) else 1))) if batch and micro else 1
        reading.put("log.logging_steps", max(1, round(every / passes)), "train.log_interval, in steps")
    tokens, length = left.pop("max_tokens", None), train.get("max_seq_length")
    if length is None and isinstance(shape, dict) and shape.get("block_size") is not None:
        length = shape["block_size"]  # as litgpt does
        reading.put("data.seq_len", length, "model_config.block_size")
    if tokens is not None and train.get("max_steps") is None:
        try:
            tokens = int(float(tokens))  # YAML reads 1e6 as a word
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"train.max_tokens is {tokens!r}; it takes a number of tokens") from None
        if batch and length:
            count = max(1, tokens // (batch * length))
            reading.put("train.max_steps", count, "train.max_tokens / (global_batch_size x length)")
            reading.assumed.append(f"train.max_steps = {count}: max_tokens {tokens} / (global_batch_size {batch} x {length} tokens a row)")
        else:
            reading.leave("train.max_tokens", tokens, "train.max_steps = tokens / (rows in a step x data.seq_len)")
    share = left.pop("lr_warmup_fraction", None)
    if share:
        reading.warm_up("train.lr_warmup_fraction", share, reading.table.get("train.max_steps"), "train.lr_warmup_fraction of max_steps")
    left.pop("tie_embeddings", None)
    for name, value in left.items():
        if value not in (None, False):
            reading.leave(f"train.{name}", value, WHY.get(name, NO_KEY))


def _evaluation(reading: Reading, evaluation: dict[str, Any], train: dict[str, Any]) -> None:
    left = dict(evaluation)
    for name, key in EVAL.items():
        value = left.pop(name, None)
        if value is not None:
            reading.put(key, value, f"eval.{name}")
    batches = left.pop("max_iters", None)
    if batches:
        reading.put("eval.eval_rows", batches * (train.get("micro_batch_size") or 1), "eval.max_iters x micro_batch_size")
    for name, value in left.items():
        if value in (None, False) or (name == "final_validation" and value is True):
            continue
        reading.leave(f"eval.{name}", value, WHY.get(name, NO_KEY))


def _optimizer(reading: Reading, optimizer: Any) -> None:
    if optimizer is None:
        return
    name = optimizer if isinstance(optimizer, str) else str(optimizer.get("class_path", ""))
    values = dict(optimizer.get("init_args") or {}) if isinstance(optimizer, dict) else {}
    if name.rpartition(".")[2].lower() in ("adamw", "adam"):
        reading.put("optim.name", "adamw", "optimizer.class_path")
    else:
        reading.leave("optimizer", name, f"adamw is taken; there is {listed(get_args(Optimizer))}")
    for theirs, key in (("lr", "optim.learning_rate"), ("weight_decay", "optim.weight_decay"), ("eps", "optim.adam_epsilon")):
        if values.get(theirs) is not None:
            reading.put(key, values[theirs], f"optimizer.{theirs}")
    betas = values.get("betas")
    if isinstance(betas, list) and len(betas) == 2:
        reading.put("optim.adam_beta1", betas[0], "optimizer.betas")
        reading.put("optim.adam_beta2", betas[1], "optimizer.betas")


def _model(reading: Reading, left: dict[str, Any], train: dict[str, Any]) -> None:
    """The shape: model_config says it, model_name is one of litgpt's own, checkpoint_dir brings it."""
    shape, name = left.pop("model_config", None), left.pop("model_name", None)
    start = left.pop("checkpoint_dir", None) or left.pop("initial_checkpoint_dir", None)
    left.pop("initial_checkpoint_dir", None)
    if isinstance(shape, dict):
        reading.put("model.arch", "transformer")
        _shape(reading, {theirs: value for theirs, value in shape.items() if value is not None})
    elif name is not None and start is None:
        reading.missing.append(f"model_name = {name!r}: the shape of this name is litgpt's, and not in the file: fill in the lines of [model] below from its "
                               "config.py, or a small default model is trained; treadle models --preset NAME prints shapes that are here")  # fmt: skip
        reading.blanks["model"] = [f"{SHAPE[word]} =  # {word} of {name}" for word in ASKED]
    if start is not None:
        reading.start = str(start)
    if train.get("tie_embeddings") is not None and start is None:
        reading.put("model.tie_embeddings", train["tie_embeddings"], "train.tie_embeddings")


def _shape(reading: Reading, shape: dict[str, Any]) -> None:
    """The values of model_config, none of them null; what no key here holds is left by its name."""
    learned = _style(reading, shape)
    for theirs, value in shape.items():
        if theirs in SHAPE and not (learned and theirs in ("rotary_percentage", "rope_base")):
            reading.put(f"model.{SHAPE[theirs]}", value, f"model_config.{theirs}")
        elif theirs not in NO_SHAPE and value not in (False, 0, "", [], {}) and not (theirs == "rope_condense_ratio" and value == 1):
            reading.leave(f"model_config.{theirs}", value, WHY_NO_SHAPE.get(theirs, NO_KEY))


def _style(reading: Reading, shape: dict[str, Any]) -> bool:
    """Norms, MLPs and biases; whether positions are learned, which they are with LayerNorm."""
    norm, mlp = shape.get("norm_class_name", "RMSNorm"), shape.get("mlp_class_name", "LLaMAMLP")
    for word, value, known in (("norm_class_name", norm, NORMS), ("mlp_class_name", mlp, MLPS)):
        if value not in known:
            reading.leave(f"model_config.{word}", value, f"there is {listed(known)}")
    plain_mlp, gelu = mlp == "GptNeoxMLP", "gelu_tanh" if shape.get("gelu_approximate") == "tanh" else "gelu"
    learned = plain_mlp or norm == "LayerNorm"
    if learned:
        reading.put("model.style", "gpt2", "model_config.norm_class_name, mlp_class_name")
        if "norm_class_name" in shape and norm == "RMSNorm":
            reading.leave("model_config.norm_class_name", norm, "an MLP without a gate has LayerNorm beside it (style gpt2)")
        if not plain_mlp and "mlp_class_name" in shape:
            reading.put("model.mlp", "swiglu", "model_config.mlp_class_name")
    if plain_mlp:
        reading.put("model.activation", gelu, "model_config.gelu_approximate")
    elif mlp == "GemmaMLP":
        reading.put("model.gated_activation", gelu, "model_config.mlp_class_name, gelu_approximate")
    bias = shape.get("bias")
    if bias is not None or shape.get("attn_bias"):
        reading.put("model.attention_bias", bool(bias or shape.get("attn_bias")), "model_config.bias, attn_bias")
        reading.put("model.attention_out_bias", bool(bias), "model_config.bias")
        reading.put("model.mlp_bias", bool(bias), "model_config.bias")
    return learned


def _data(reading: Reading, data: Any) -> None:
    if data is None:
        return
    kind = (data if isinstance(data, str) else str(data.get("class_path", ""))).rpartition(".")[2]
    values = dict(data.get("init_args") or {}) if isinstance(data, dict) else {}
    if kind == "TextFiles":
        reading.put("data.path", values.get("train_data_path"), "data.train_data_path")
        if values.get("val_data_path") is not None:
            reading.put("data.validation_path", values["val_data_path"], "data.val_data_path")
    elif kind == "TinyStories":
        reading.put("data.path", "tinystories", "data")
    elif kind == "JSON":
        reading.put("data.path", values.get("json_path"), "data.json_path")
        reading.put("train.objective", "sft", "data")
        if values.get("val_split_fraction") is not None:
            reading.put("data.validation_fraction", values["val_split_fraction"], "data.val_split_fraction")
        reading.put("data.train_on", "completion" if values.get("mask_prompt") else "all", "data.mask_prompt")
    else:
        reading.leave("data", kind, "litgpt fetches it; here: data.path names a file, data.dataset_name a data set of the Hugging Face hub")
    if values.get("num_workers") is not None:
        reading.put("data.num_workers", values["num_workers"], "data.num_workers")


def _machine(reading: Reading, left: dict[str, Any]) -> None:
    precision = left.pop("precision", None)
    if precision is not None:
        word = PRECISION.get(str(precision).partition("-")[0])
        if word is None:
            reading.leave("precision", precision, "there is fp32, bf16 and fp16")
        else:
            reading.put("train.precision", word, "precision")
            if str(precision).endswith("-true") and word != "fp32":
                reading.assumed.append(f"precision: {precision} holds the weights in it too; here they stay in fp32 and products are taken in {word}")
    devices = left.pop("devices", None)
    if isinstance(devices, int) and devices > 1:
        reading.put("run.devices", devices, "devices")
    if left.get("num_nodes") == 1:
        left.pop("num_nodes")
    sink = left.pop("logger_name", None)
    if sink in get_args(Sink):
        reading.put("log.report_to", [sink] if sink in FILE_SINKS else [*FILE_SINKS, sink], "logger_name")
    elif sink is not None:
        reading.leave("logger_name", sink, f"there is {listed(get_args(Sink))}")
    folder = left.pop("tokenizer_dir", None)
    if folder is not None:
        if Path(str(folder)).is_dir():
            reading.put("tokenizer.name", str(folder), "tokenizer_dir")
        else:
            reading.leave("tokenizer_dir", folder, "is not here; give tokenizer.name the folder where it is (a BPE is trained on the text until then)")


def _adapters(reading: Reading, left: dict[str, Any]) -> None:
    asked = {name: left.pop(f"lora_{name}") for name in (*LORA, "head") if f"lora_{name}" in left}
    if "adapter.lora_rank" not in reading.table:
        return
    if asked.get("head"):
        reading.leave("lora_head", True, WHY["lora_head"])
    targets = [target for name, layers in LORA.items() if asked.get(name) for target in layers]
    if targets and not all(asked.get(name) for name in LORA):
        reading.put("adapter.lora_targets", targets, "lora_query, lora_key, ...")
