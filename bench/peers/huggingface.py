"""Hugging Face's Trainer with its own GPT-2, as its documentation shows; fp32, or bf16 by its own flag.

It predicts 255 of a row's 256 symbols (GPT-2 shifts the labels itself), and computes all 256: the cost is that of the
others. Its logged loss is the mean over those 255.
"""

from __future__ import annotations

import tempfile

from bench import hook
from bench.task import arguments


def main() -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    given, task = arguments("Hugging Face Trainer")
    config = GPT2Config(
        vocab_size=task.vocabulary, n_positions=task.length, n_embd=task.width, n_layer=task.layers, n_head=task.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=254, eos_token_id=255,
    )  # fmt: skip
    torch.manual_seed(task.seed)  # the Trainer seeds only what comes after the model
    model = GPT2LMHeadModel(config)
    # Transformers 5 finds no loss in the name GPT2LMHeadModel, and would divide the sum over 255 symbols by 256.
    model.loss_type = "ForCausalLM"
    data = task.data()

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return task.rows * task.steps

        def __getitem__(self, index: int) -> dict:
            row = torch.from_numpy(task.batch(data, index // task.rows)[index % task.rows, : task.length])
            return {"input_ids": row, "labels": row}

    class Logged(Trainer):
        losses: list[float] = []  # noqa: RUF012 - one trainer a process

        def log(self, logs: dict, *rest: object, **named: object) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, max_steps=task.steps, per_device_train_batch_size=task.rows, logging_steps=1,
            learning_rate=task.learning_rate, weight_decay=task.weight_decay, adam_beta2=0.95, save_strategy="no",
            report_to=[], use_cpu=True, bf16=given.precision == "bf16", disable_tqdm=True, lr_scheduler_type="constant",
            dataloader_num_workers=0, max_grad_norm=1.0,
        )  # fmt: skip
        hook.watch(given.log, name="huggingface", parameters=model.num_parameters(), precision=given.precision,
                   tokens_per_step=task.tokens_per_step)  # fmt: skip
        trainer = Logged(model=model, args=settings, train_dataset=Rows())
        trainer.train()
    hook.describe(given.log, losses=Logged.losses)


if __name__ == "__main__":
    main()
