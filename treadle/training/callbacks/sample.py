"""Changes nothing; writes what the model says at each evaluation (eval.sample_tokens) to samples/."""

from __future__ import annotations

from treadle.training.callbacks.base import Callback
from treadle.training.context import Context


class Sample(Callback):
    """Lets the model write at each evaluation."""

    name = "sample"

    def wanted(self, context: Context) -> bool:
        return context.config.eval.sample_tokens > 0

    def on_evaluate(self, context: Context) -> None:
        if not (context.is_main_process or context.full_weights_need_all_ranks):
            return  # only shards need everybody
        wanted, data = context.config.eval, context.eval_dataset or context.dataset
        text = context.with_full_weights(
            lambda model: context.objective.sample(model, data, wanted.sample_prompt, wanted.sample_tokens, context.step)
        )
        if text and context.is_main_process:
            folder = context.log_folder / "samples"
            folder.mkdir(exist_ok=True)
            (folder / f"step-{context.step:08d}.txt").write_text(text, encoding="utf-8")
