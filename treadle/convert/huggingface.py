"""Hugging Face TrainingArguments: the JSON that Trainer writes, and scripts that build them (transformers 5, trl).

Arguments that mean the same under the same name go through as they are; the table here is for the others. Defaults that a script
leaves out are written where treadle's are others (transformers' documentation of TrainingArguments).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, get_args

from treadle.convert.reading import NO_KEY, Reading, listed, of_steps
from treadle.convert.script import ARGUMENTS, Script
from treadle.monitor.settings import FILE_SINKS, Sink
from treadle.training.settings import Optimizer

# Defaults that differ from treadle's, by their name.
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "num_train_epochs": 3.0, "learning_rate": 5e-5,
    "lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.0, "adam_beta2": 0.999, "logging_steps": 500, "save_steps": 500,
    "seed": 42,
}  # fmt: skip
# Those of trl's classes, by their objective.
OTHER_DEFAULTS: dict[str | None, dict[str, Any]] = {"sft": {"learning_rate": 2e-5}, "dpo": {"learning_rate": 1e-6}}
# The same name and meaning here.
SAME = {
    "per_device_train_batch_size", "per_device_eval_batch_size", "num_train_epochs", "learning_rate", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "gradient_accumulation_steps", "max_grad_norm", "eval_on_start", "save_total_limit", "seed",
    "resume_from_checkpoint", "run_name", "output_dir", "logging_dir",
    # trl and peft
    "max_length", "assistant_only_loss", "completion_only_loss", "chat_template_path", "beta", "label_smoothing", "loss_type",
    "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_peft", "lora_r", "lora_target_modules", "load_in_8bit",
    "dataset_name", "dataset_config", "model_revision",
}  # fmt: skip
RENAMED = {
    "use_cpu": "", "dataloader_num_workers": "data.num_workers", "dataloader_prefetch_factor": "data.prefetch_factor",
    "ddp_backend": "parallel.backend", "ddp_bucket_cap_mb": "parallel.bucket_megabytes", "ddp_static_graph": "parallel.static_graph",
    "ddp_timeout": "parallel.communication_timeout", "deepspeed": "parallel.deepspeed", "max_seq_length": "data.seq_len",
    "dataset_text_field": "data.text_column", "trackio_space_id": "",
    "train_file": "data.path", "validation_file": "data.validation_path",  # of transformers' example scripts
}  # fmt: skip
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant", "cosine_with_min_lr": "cosine",
             "cosine_warmup_with_min_lr": "cosine", "warmup_stable_decay": "wsd"}  # fmt: skip
# What says nothing when it has this value: their defaults, and what is so here anyway.
IDLE: dict[str, Any] = {
    "average_tokens_across_devices": True, "logging_strategy": "steps", "log_on_each_node": True, "logging_nan_inf_filter": True,
    "include_num_input_tokens_seen": "no", "log_level": "passive", "log_level_replica": "warning", "project": "huggingface",
    "eval_do_concat_batches": True, "hub_token": "<HUB_TOKEN>", "hub_strategy": "every_save", "dataloader_pin_memory": True,
    "dataloader_in_order": True, "remove_unused_columns": True, "train_sampling_strategy": "random", "length_column_name": "length",
    "ddp_timeout": 1800, "skip_memory_metrics": True, "local_rank": -1, "do_train": True, "do_eval": True, "lr_scheduler_kwargs": {},
    "torchdynamo": None, "data_seed": None, "save_safetensors": True, "dataloader_persistent_workers": True, "use_reentrant": False,
    "ddp_find_unused_parameters": False, "fsdp_min_num_params": 0, "logging_first_step": True, "full_determinism": True,
    "load_best_model_at_end": False, "overwrite_output_dir": False, "optim": "adamw_torch", "task_type": "CAUSAL_LM", "bias": "none",
    "packing_strategy": "bfd", "tf32": None, "greater_is_better": None, "ignore_data_skip": False,
}  # fmt: skip
WHY = {
    "accelerator_config": "rows are shared out exactly, whatever the number of processes",
    "auto_find_batch_size": "treadle plan says what fits; where memory ends, the error names a batch that does",
    "data_seed": "run.seed decides the order of the data too",
    "dataset_num_proc": "data.preparation_workers: one for each core already",
    "debug": "a step that hangs: train.step_timeout; gradients: log.health",
    "dataloader_drop_last": "every row is trained on",
    "disable_tqdm": "the log is lines, no bar",
    "eval_accumulation_steps": "evaluation keeps sums, no logits",
    "fp16_full_eval": "evaluation runs in the precision of training",
    "bf16_full_eval": "evaluation runs in the precision of training",
    "fsdp_config": "parallel.shard_size, reshard_after_forward and cpu_offload are the keys",
    "gradient_checkpointing_kwargs": "there is one way of recomputing",
    "group_by_length": "data.packing = \"best_fit\" fills rows instead",
    "label_smoothing_factor": "the loss is the cross-entropy of the text as it stands",
    "load_best_model_at_end": "the best checkpoint is kept: RUN@best, in every verb",
    "neftune_noise_alpha": "embeddings get no noise",
    "optim_args": "the optimiser's numbers are keys of [optim]",
    "model_name_or_path": "start from it: --from NAME, the folder (or run) where that model lies",
    "overwrite_output_dir": "say it when you train: --fresh (a run that is there goes on otherwise)",
    "push_to_hub": "that is a verb: treadle export RUN, then upload the folder",
    "save_only_model": "a checkpoint always holds all that a run needs to go on exactly",
    "torch_compile_backend": "there is one way of compiling",
    "torch_compile_mode": "there is one way of compiling",
    "use_liger_kernel": "norms, rotations and the loss are fused already where that is faster",
    "modules_to_save": "adapters alone are trained",
    "optim_target_modules": "adapters: adapter.lora_targets",
}
OBJECTIVES = {"SFTConfig": "sft", "DPOConfig": "dpo"}


def is_script(script: Script) -> bool:
    """Whether a script builds the arguments of transformers or trl."""
    return bool({"transformers", "trl"} & script.imports) and any(ARGUMENTS.search(name) for name in script.arguments)


def read_script_arguments(script: Script) -> Reading:
    """The arguments that a script builds; what it leaves out is at their defaults."""
    values: dict[str, Any] = {}
    for given in script.arguments.values():
        values.update(given)
    objective = next((OBJECTIVES[name] for name in script.arguments if name in OBJECTIVES), None)
    reading = read_arguments(values, script.path.stem, complete=False, objective=objective)
    reading.leave_computed(script.computed)
    reading.start = reading.start or script.base_model
    return reading


def read_arguments(values: dict[str, Any], stem: str, complete: bool = True, objective: str | None = None) -> Reading:
    """TrainingArguments as a table; complete: every argument is in it, so that none is at a default."""
    reading = Reading("huggingface")
    if objective is not None:
        reading.put("train.objective", objective)
    given = values
    if not complete:
        values = {**given, **{name: value for name, value in {**DEFAULTS, **OTHER_DEFAULTS.get(objective, {})}.items() if name not in given}}
    reading.put("run.run_name", values.get("run_name") or stem, "run_name" if values.get("run_name") else "")
    for name, value in values.items():
        if name in SAME and value is not None:
            reading.put(name, value, name if name in given else "transformers' default")
    for name, key in RENAMED.items():
        if key and values.get(name) is not None and values[name] != IDLE.get(name):
            reading.put(key, values[name], name)
    handled = {*SAME, *RENAMED, *_duration(reading, values), *_rate(reading, values, given), *_numbers(reading, values), *_times(reading, values),
               *_where(reading, values)}  # fmt: skip
    if "packing" in values:
        how = "concat" if values.get("packing_strategy") == "wrapped" else "best_fit"
        reading.put("data.packing", how if values["packing"] else "none", "packing")
        handled |= {"packing", "packing_strategy"}
    if values.get("use_cpu"):
        reading.put("run.device", "cpu", "use_cpu")
    if values.get("model_name_or_path"):
        reading.start = str(values["model_name_or_path"])
    for name, value in given.items():
        if name in handled or value in (None, False, "", [], {}, 0) or value == IDLE.get(name):
            continue
        if name.startswith("hub_"):
            continue  # said once, by push_to_hub
        if name == "accelerator_config" and isinstance(value, dict) and value.get("dispatch_batches") is None and not value.get("split_batches"):
            continue
        reading.leave(name, value, WHY.get(name, NO_KEY))
    return reading


def _duration(reading: Reading, values: dict[str, Any]) -> set[str]:
    if (steps := _steps(values)) is not None:
        reading.put("train.max_steps", steps, "max_steps")
    return {"max_steps"}


def _steps(values: dict[str, Any]) -> Any:
    """max_steps; None where epochs decide, which is 0 or less there."""
    steps = values.get("max_steps") or -1
    return steps if steps > 0 else None


def _rate(reading: Reading, values: dict[str, Any], given: Collection[str]) -> set[str]:
    """The schedule; theirs falls to 0 unless it says otherwise."""
    word = str(values.get("lr_scheduler_type", "linear")).rpartition(".")[2].lower()
    extra = values.get("lr_scheduler_kwargs") or {}
    mine = SCHEDULES.get(word)
    if mine is None:
        reading.leave("lr_scheduler_type", word, f"cosine is taken; there is {', '.join(sorted(set(SCHEDULES.values())))}")
    reading.put("optim.lr_scheduler_type", mine or "cosine", word if "lr_scheduler_type" in given else "transformers' default")
    if extra.get("min_lr") is not None:
        reading.put("optim.min_lr", extra["min_lr"], "lr_scheduler_kwargs")
    elif mine != "constant":
        reading.put("optim.min_lr_ratio", float(extra.get("min_lr_rate") or extra.get("min_lr_ratio") or 0.0), "lr_scheduler_kwargs" if extra else "")
    warmup = values.get("warmup_ratio") or values.get("warmup_steps") or 0
    if word == "constant" and warmup:
        reading.put("optim.warmup_steps", 0, "lr_scheduler_type = constant takes no warm-up")
    elif 0 < warmup < 1:
        reading.warm_up("warmup_ratio", warmup, _steps(values), f"{warmup:g} of max_steps")
    else:
        reading.put("optim.warmup_steps", int(warmup), "warmup_steps")
    optimizer = str(values.get("optim", "adamw_torch")).rpartition(".")[2].lower()
    if optimizer.startswith(get_args(Optimizer)) and not any(word in optimizer for word in ("8bit", "anyprecision", "paged")):
        reading.put("optim.name", optimizer.partition("_")[0], "optim")
    elif "optim" in values:
        reading.leave("optim", optimizer, f"adamw is taken; there is {listed(get_args(Optimizer))}")
    return {"lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps", "optim"}


def _numbers(reading: Reading, values: dict[str, Any]) -> set[str]:
    """Precision, recomputation, compilation."""
    half = next((word for word in ("bf16", "fp16") if values.get(word)), None)
    reading.put("train.precision", half or "fp32", half or "neither bf16 nor fp16")
    if values.get("gradient_checkpointing") or values.get("activation_checkpointing"):
        reading.put("train.gradient_checkpointing", True, "gradient_checkpointing")
    if values.get("torch_compile"):
        reading.put("train.torch_compile", "auto", "torch_compile")
    return {"bf16", "fp16", "gradient_checkpointing", "activation_checkpointing", "torch_compile"}


def _times(reading: Reading, values: dict[str, Any]) -> set[str]:
    """When it logs, saves and evaluates: steps, or a share of them."""
    steps = _steps(values)

    def number(name: str) -> int | None:
        value = values.get(name)
        if value is None or value <= 0:
            return None
        if value < 1 and steps is None:
            reading.leave(name, value, "a share needs a number of steps (a tenth of the run until then)")
            return None
        return of_steps(value, steps) if value < 1 else int(value)

    every = number("logging_steps")
    if every is not None and values.get("logging_strategy", "steps") == "steps":
        reading.put("log.logging_steps", every, "logging_steps")
    for verb, key in (("save", "checkpoint.save_steps"), ("eval", "eval.eval_steps")):
        name = f"{verb}_strategy"
        word = str(values.get(name, values.get("evaluation_strategy", "no") if verb == "eval" else "steps")).rpartition(".")[2].lower()
        wanted = number(f"{verb}_steps") or (every if verb == "eval" else None)
        if word == "steps" and wanted is not None:
            reading.put(key, wanted, f"{verb}_steps")
        elif word == "epoch":
            reading.leave(name, word, f"{key} counts steps (a tenth of the run until then)")
        elif word == "no" and name in values and verb == "save":
            reading.leave(name, word, "a tenth of the run is saved at a time, the newest save_total_limit kept")
    metric = str(values.get("metric_for_best_model") or "loss")
    if metric not in ("loss", "eval_loss"):
        reading.leave("metric_for_best_model", metric, "loss is taken; there is loss, bpb, accuracy, and what an objective of one's own reports")
    return {"logging_steps", "save_steps", "eval_steps", "save_strategy", "eval_strategy", "evaluation_strategy", "metric_for_best_model", "logging_strategy"}


def _where(reading: Reading, values: dict[str, Any]) -> set[str]:
    """Sinks of metrics, and how processes share the work."""
    sinks = values.get("report_to")
    names = [sinks] if isinstance(sinks, str) else list(sinks or [])
    if names in (["all"], ["none"]):
        reading.put("log.report_to", names[0], "report_to")
    elif names:
        reading.put("log.report_to", [*FILE_SINKS, *(name for name in names if name in get_args(Sink) and name not in FILE_SINKS)], "report_to")
        if other := [name for name in names if name not in get_args(Sink)]:
            reading.leave("report_to", other, f"there is {listed(get_args(Sink))}")
    if values.get("project") not in (None, "huggingface"):
        reading.put("log.project", values["project"], "project")
    sharded = values.get("fsdp")
    if sharded:
        reading.put("parallel.mode", "fsdp", "fsdp")
        if "offload" in str(sharded):
            reading.put("parallel.cpu_offload", True, "fsdp")
    return {"report_to", "project", "fsdp"}
