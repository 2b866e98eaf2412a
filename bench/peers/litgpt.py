"""litgpt's GPT in the loop of its pretraining script (fp32, eager or compiled), at the shape of the task.

Its GPT has rotary positions instead of learned ones (1% fewer parameters at this size) and GPT-NeoX's block, which is what it offers for
a 4 x width MLP with biases. BENCH_COMPILE=1 compiles it, as its script does.
"""

from __future__ import annotations

import os

from bench import hook
from bench.task import arguments, train


def main() -> None:
    given, task = arguments("litgpt")
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from torch.nn import functional as F

    config = Config(
        name="bench", block_size=task.length, vocab_size=task.vocabulary, padded_vocab_size=task.vocabulary, n_layer=task.layers,
        n_head=task.heads, n_embd=task.width, rotary_percentage=1.0, parallel_residual=False, bias=True,
        norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP", intermediate_size=4 * task.width, gelu_approximate="tanh",
    )  # fmt: skip
    torch.manual_seed(task.seed)
    model = GPT(config)
    model.lm_head.weight = model.transformer.wte.weight  # tied, as in the others
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, 0, 0.02)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": task.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=task.learning_rate, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    hook.watch(given.log, name="litgpt", parameters=sum(p.numel() for p in model.parameters()), precision="fp32",
               tokens_per_step=task.tokens_per_step)  # fmt: skip
    step_model = torch.compile(model) if os.environ.get("BENCH_COMPILE") else model

    def loss_of(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = step_model(inputs)
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))

    hook.describe(given.log, losses=train(task, model, optimizer, loss_of))


if __name__ == "__main__":
    main()
