"""nanoGPT's config/*.py: constants that change those of its train.py (github.com/karpathy/nanoGPT).

Its defaults are written out where a file leaves them, since treadle's are others; learning_rate and the like mean the same.
"""

from __future__ import annotations

from typing import Any

from treadle.convert.reading import Reading
from treadle.convert.script import Script

# What its train.py sets before a config file is read.
DEFAULTS: dict[str, Any] = {
    "eval_interval": 2000, "log_interval": 1, "eval_iters": 200, "gradient_accumulation_steps": 40, "batch_size": 12, "block_size": 1024,
    "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False, "learning_rate": 6e-4, "max_iters": 600000,
    "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0, "decay_lr": True, "warmup_iters": 2000,
    "lr_decay_iters": 600000, "min_lr": 6e-5, "init_from": "scratch", "dataset": "openwebtext", "out_dir": "out",
}  # fmt: skip
# Its word -> the key here, where the value means the same.
SAME = {
    "learning_rate": "optim.learning_rate", "weight_decay": "optim.weight_decay", "beta1": "optim.adam_beta1", "beta2": "optim.adam_beta2",
    "grad_clip": "optim.max_grad_norm", "warmup_iters": "optim.warmup_steps", "max_iters": "train.max_steps",
    "batch_size": "train.per_device_train_batch_size", "block_size": "data.seq_len", "n_layer": "model.num_layers",
    "n_head": "model.num_heads", "n_embd": "model.hidden_size", "dropout": "model.dropout", "log_interval": "log.logging_steps",
    "eval_interval": "eval.eval_steps", "out_dir": "run.output_dir", "wandb_project": "log.project", "wandb_log": "use_wandb",
    "seed": "run.seed", "gradient_accumulation_steps": "train.gradient_accumulation_steps",
}  # fmt: skip
SHAPE = ("n_layer", "n_head", "n_embd", "dropout", "bias", "block_size")
WORDS = {*DEFAULTS, *SAME, "wandb_run_name", "always_save_checkpoint", "eval_only", "device", "dtype", "compile", "backend"}


def is_config(constants: dict[str, Any]) -> bool:
    """Whether a script's constants are those of nanoGPT: three of its words, one of which nobody else uses."""
    own = {"n_embd", "block_size", "max_iters", "eval_iters", "lr_decay_iters", "warmup_iters", "init_from", "wandb_log"}
    return len(WORDS & set(constants)) >= 3 and bool(own & set(constants))


def read(script: Script) -> Reading:
    """Its constants over its defaults."""
    given = script.constants
    values = {**DEFAULTS, **given}
    reading = Reading("nanogpt")
    from_weights = str(values["init_from"]).startswith("gpt2")
    for name, key in SAME.items():
        if name in values and not (from_weights and name in SHAPE and name not in given):
            reading.put(key, values[name], _called(given, name))
    reading.put("run.run_name", str(given.get("wandb_run_name", script.path.stem)), "wandb_run_name" if "wandb_run_name" in given else "")
    _shape(reading, values, given, from_weights)
    _schedule(reading, values, given)
    _data(reading, script, str(values["dataset"]))
    reading.put("checkpoint.save_steps", values["eval_interval"], _called(given, "eval_interval"))
    rows = int(values["eval_iters"]) * int(values["batch_size"])
    reading.put("eval.eval_rows", rows, f"{_called(given, 'eval_iters')} x {_called(given, 'batch_size')}")
    reading.assumed.append(f"eval.eval_rows = {rows}: as many as nanoGPT draws at each evaluation, of the validation text and again of the training text; "
                           "here they are of the validation text alone, and no more than it has")  # fmt: skip
    _machine(reading, given)
    if "always_save_checkpoint" in given:
        reading.leave("always_save_checkpoint", given["always_save_checkpoint"], "every save_steps is saved, the newest save_total_limit and the best are kept")
    if given.get("eval_only"):
        reading.leave("eval_only", True, "that is a verb: treadle eval RUN")
    for name in given.keys() - WORDS:
        reading.leave(name, given[name], "nanoGPT's train.py has no such word, so it does nothing there either")
    reading.leave_computed(script.computed)
    return reading


def _called(given: dict[str, Any], name: str) -> str:
    """What stands beside a value: its word there, and whether the file says it."""
    return name if name in given else f"{name} (nanoGPT's default)"


def _shape(reading: Reading, values: dict[str, Any], given: dict[str, Any], from_weights: bool) -> None:
    if from_weights:
        reading.start = str(values["init_from"]).replace("gpt2-", "openai-community/gpt2-") if "-" in str(values["init_from"]) else "openai-community/gpt2"
        for key in [key for key in reading.table if key.startswith("model.") and key != "model.dropout"]:
            del reading.table[key]  # the weights bring their shape
        return
    if values["init_from"] == "resume":
        reading.leave("init_from", "resume", "the same command goes on with its own run; weights of nanoGPT's ckpt.pt are not read")
    reading.put("model.arch", "transformer")
    reading.put("model.style", "gpt2")
    reading.put("model.activation", "gelu")
    reading.put("model.max_position_embeddings", values["block_size"], _called(given, "block_size"))
    if not values["bias"]:
        reading.put("model.attention_bias", False, _called(given, "bias"))
        reading.put("model.mlp_bias", False, _called(given, "bias"))
        reading.leave(_called(given, "bias"), False, "said for the linear layers; LayerNorms keep their biases here")


def _schedule(reading: Reading, values: dict[str, Any], given: dict[str, Any]) -> None:
    name = _called(given, "lr_decay_iters")
    if not values["decay_lr"]:
        reading.put("optim.lr_scheduler_type", "constant", "decay_lr")
        if "lr_decay_iters" in given:
            reading.leave(name, values["lr_decay_iters"], "the rate does not fall (decay_lr = False)")
        return
    reading.put("optim.lr_scheduler_type", "cosine", _called(given, "decay_lr"))
    reading.put("optim.min_lr", values["min_lr"], _called(given, "min_lr"))
    if values["lr_decay_iters"] != values["max_iters"]:
        reading.leave(name, values["lr_decay_iters"], f"the rate falls until the last step, {values['max_iters']}")
    elif "lr_decay_iters" in given:
        reading.assumed.append(f"lr_decay_iters = {values['lr_decay_iters']}: the last step, until which the rate falls here anyway")


def _data(reading: Reading, script: Script, dataset: str) -> None:
    """data/NAME/input.txt where its prepare.py left one; the text itself is not in a config file."""
    places = [script.path.parent / "data" / dataset / "input.txt", script.path.parent.parent / "data" / dataset / "input.txt"]
    text = next((place for place in places if place.is_file()), None)
    if text is not None:
        reading.put("data.path", str(text), "dataset")
    elif dataset == "openwebtext":
        reading.leave("dataset", dataset, "fetched by its prepare.py; here: dataset_name = \"Skylion007/openwebtext\" in place of data.path")
    else:
        reading.leave("dataset", dataset, f"its train.bin holds token numbers; give data.path the text, as {places[0]}")
    if dataset.endswith("_char"):
        reading.put("tokenizer.name", "char", "dataset")
    elif reading.start is None:
        reading.assumed.append("tokenizer: nanoGPT takes GPT-2's; a BPE of 2048 tokens is trained on the text here, or give tokenizer.name a folder")


def _machine(reading: Reading, given: dict[str, Any]) -> None:
    if str(given.get("device", "cuda")).startswith("cuda"):
        given = {name: value for name, value in given.items() if name != "device"}  # auto takes a GPU where there is one
    if "device" in given:
        reading.put("run.device", given["device"], "device")
    if "dtype" in given:
        reading.put("train.precision", given["dtype"], "dtype")
    if "compile" in given:
        reading.put("train.torch_compile", "auto" if given["compile"] else False, "compile")
    if given.get("backend", "nccl") != "nccl":  # auto takes nccl between GPUs
        reading.put("parallel.backend", given["backend"], "backend")
