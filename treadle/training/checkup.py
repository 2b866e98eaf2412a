"""Looking at the model while it trains: evaluation, the best so far, early stopping, a text sample."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from treadle.evaluation.evaluator import LOWER_IS_BETTER
from treadle.models.base import Model
from treadle.ops.precision import autocast
from treadle.training import steering

if TYPE_CHECKING:
    from treadle.training.trainer import Trainer


def evaluate(trainer: Trainer) -> tuple[bool, bool]:
    """(a new best, training ends here)."""
    assert trainer.eval_dataset is not None
    metrics = trainer.evaluator.evaluate(
        trainer.eval_dataset, trainer.eval_batch(), trainer.recipe.eval.eval_rows, lambda: steering.obey(trainer)
    )
    if metrics is None:  # stopped on the way; the next start evaluates this step first
        return False, False
    state = trainer.state
    state.evaluated_step = state.step
    row = {"step": state.step, "split": "validation", **metrics, **trainer.evaluator.inspect(trainer.eval_dataset)}
    for sink in trainer.sinks:
        sink.evaluation(row)
    shown = f"loss {metrics['loss']:.4f}  bpb {metrics['bpb']:.4f}  accuracy {metrics['accuracy']:.3f}"
    trainer.console.say(f"evaluation at step {state.step}: {shown}")
    _sample(trainer)
    trainer.tell("evaluate", row)
    name = trainer.recipe.checkpoint.metric_for_best_model
    sign = 1 if LOWER_IS_BETTER[name] else -1
    value = sign * metrics[name]
    improved = math.isfinite(value) and (state.best_metric is None or value < sign * state.best_metric)
    if improved:
        state.best_metric, state.best_step = metrics[name], state.step
        trainer.alerts.send("best", f"step {state.step}: best {name} {metrics[name]:.4f}", step=state.step)
    return improved, _early_stop(trainer, metrics["loss"])


def _early_stop(trainer: Trainer, loss: float) -> bool:
    state, wanted = trainer.state, trainer.recipe.eval
    bar = math.inf if state.best_loss is None else state.best_loss - wanted.early_stopping_threshold
    if loss < bar:
        state.best_loss, state.stale_evaluations = loss, 0
    else:
        state.stale_evaluations += 1
    if wanted.target_loss is not None and loss <= wanted.target_loss:
        return _end(trainer, f"target_loss {wanted.target_loss} is reached")
    patience = wanted.early_stopping_patience
    if patience is not None and state.stale_evaluations >= patience:
        return _end(trainer, f"no better loss in {patience} evaluations")
    return False


def _end(trainer: Trainer, reason: str) -> bool:
    trainer.state.ended = reason
    trainer.console.say(f"{reason}; training ends")
    return True


def _sample(trainer: Trainer) -> None:
    if trainer.recipe.eval.sample_tokens == 0 or not trainer.model.capabilities.decodes:
        return
    if not (trainer.world.is_main_process or trainer.strategy.full_weights_need_all_ranks):
        return  # only shards need everybody
    text = trainer.strategy.with_full_weights(lambda model: _sampled_text(trainer, model))
    if not trainer.world.is_main_process:
        return
    folder = trainer.log_folder / "samples"
    folder.mkdir(exist_ok=True)
    (folder / f"step-{trainer.state.step:08d}.txt").write_text(
        trainer.recipe.eval.sample_prompt + text, encoding="utf-8"
    )


def _sampled_text(trainer: Trainer, model: Model) -> str:
    from treadle.generation.decode import generate_text

    prompt = trainer.recipe.eval.sample_prompt or "\n"
    # Gathered weights come in the type that products are computed in.
    precision = "fp32" if trainer.strategy.mode in ("none", "ddp") else trainer.precision
    with autocast(precision, trainer.device):
        return generate_text(model, trainer.tokenizer, prompt, trainer.recipe.eval.sample_tokens, seed=trainer.state.step,
                             temperature=0.8)  # fmt: skip
