"""Configurations as users of other trainers have them, small enough to be tried: name -> (kind, text)."""

from __future__ import annotations

FILES: dict[str, tuple[str, str]] = {
    "shakespeare_char.py": ("nanogpt", """
# train a miniature character-level model
out_dir = 'out-char'
eval_interval = 250
eval_iters = 2
wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 5 * 8
batch_size = 2
block_size = 32
n_layer = 1
n_head = 2
n_embd = 32
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 4000
min_lr = 1e-4
beta2 = 0.99
device = 'cpu'
compile = False
"""),
    "pretrain.yaml": ("litgpt", """
model_name: pythia-14m
model_config: {n_layer: 1, n_head: 2, n_embd: 32, block_size: 64, parallel_residual: true}
out_dir: out/pretrain
precision: bf16-mixed
resume: false
data: {class_path: litgpt.data.TextFiles, init_args: {train_data_path: texts, num_workers: 0}}
train: {save_interval: 1000, log_interval: 8, global_batch_size: 8, micro_batch_size: 2, lr_warmup_fraction: 0.1, max_tokens: 102400,
        max_seq_length: 64, tie_embeddings: true, max_norm: 1.0, min_lr: 4e-05}
eval: {interval: 50, max_iters: 4, initial_validation: false, final_validation: true}
optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 4e-4, weight_decay: 0.1, betas: [0.9, 0.99], fused: true}}
devices: auto
num_nodes: 1
tokenizer_dir: checkpoints/EleutherAI/pythia-14m
logger_name: mlflow
seed: 42
"""),
    "arguments.json": ("huggingface", """
{"output_dir": "out", "per_device_train_batch_size": 2, "max_steps": 100, "learning_rate": 5e-05, "lr_scheduler_type": "cosine_with_min_lr",
 "lr_scheduler_kwargs": {"min_lr_rate": 0.2}, "warmup_ratio": 0.1, "optim": "adafactor", "weight_decay": 0.0, "adam_beta2": 0.999, "bf16": true,
 "logging_steps": 0.05, "eval_strategy": "steps", "eval_steps": null, "save_strategy": "epoch", "report_to": ["wandb", "mlflow"], "seed": 7,
 "push_to_hub": true, "hub_model_id": "me/x", "neftune_noise_alpha": 5, "ddp_timeout": 1800, "use_cpu": true, "accelerator_config": {"split_batches": false},
 "dataloader_num_workers": 0}
"""),
    "sft.py": ("huggingface", """
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
from transformers import AutoModelForCausalLM
NAME = "gpt2"
model = AutoModelForCausalLM.from_pretrained(NAME)
config = SFTConfig(output_dir="tuned", max_length=512, packing=True, per_device_train_batch_size=2, max_steps=20,
                   gradient_checkpointing=True, run_name=f"run-{NAME}", report_to="none")
"""),
    "shc_train.py": ("shc", """
import argparse
from shc.training import TrainingArguments
D_MODEL, N_LAYERS = 32, 1
D_MODEL = 32
NUM_LAYERS = 1
NUM_HEADS = 2
NUM_STREAMS = 4
ROWS = 2
args = TrainingArguments(output_dir="out", per_device_train_batch_size=ROWS, learning_rate=3e-4, warmup_steps=2, max_steps=100,
                         weight_decay=0.1, mixed_precision="bf16", log_steps=10, use_ddp=True, tracking_uri="x")
"""),
    "collatz_train.py": ("collatz", """
# A transformer over Collatz trajectories
import os
BATCH_SIZE = 16
NUM_WORKERS = os.cpu_count()
PREFETCH_FACTOR = 4
D_MODEL = 32
NUM_LAYERS = 1
NHEAD = 2
LEARNING_RATE = 1e-4
STEPS = 4
SAVE_EVERY = 2
CHECKPOINT_FILE = "collatz.pt"
"""),
    "complexity.yaml": ("complexity", """
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 4, num_key_value_heads: 2, use_inl_dynamics: true, num_experts: 4,
        use_token_routed_mlp: true}
training: {batch_size: 2, lr: 3e-4, max_steps: 10, fp16: false, save_dir: kept}
"""),
    "experiment.json": ("bytes", """
{"experiment_name": "first",
 "model": {"config_file": "flat.json", "type": "flat"},
 "data": {"data_dir": "texts", "max_seq_length": 64},
 "training": {"batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "max_steps": 3, "warmup_steps": 1,
              "scheduler": "cosine", "mixed_precision": "no"},
 "output": {"checkpoint_dir": "out/checkpoints", "log_dir": "out/logs"}}
"""),
    "config.json": ("llm_trainer", """
{"model": {"d_model": 32, "n_heads": 2, "n_layers": 1, "d_ff": 64, "max_seq_len": 256, "dropout": 0.1, "attention_dropout": 0.1,
           "activation": "gelu", "pre_norm": true, "gradient_checkpointing": true},
 "training": {"batch_size": 2, "num_epochs": 1, "max_steps": 3, "learning_rate": 3e-4, "lr_scheduler": "cosine",
              "optimizer": "adamw", "use_amp": false, "amp_dtype": "bfloat16", "max_grad_norm": 1.0, "save_steps": 1,
              "eval_steps": 1, "logging_steps": 1, "checkpoint_dir": "kept", "report_to": ["tensorboard"],
              "save_total_limit": 2, "metric_for_best_model": "eval_loss", "early_stopping": true, "compile_model": false,
              "distributed_backend": "gloo", "use_deepspeed": false, "deepspeed_config": null},
 "data": {"data_path": "texts", "validation_split": 0.1, "text_column": "text", "max_length": 64, "min_length": 4,
          "pack_sequences": true, "packing_strategy": "greedy", "preprocessing_num_workers": 1}}
"""),
}  # fmt: skip
FLAT = '{"model_type": "simplified_slm", "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 64}'
