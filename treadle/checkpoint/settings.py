"""The [checkpoint] section."""

from __future__ import annotations

from treadle.settings import Settings, option


class CheckpointSettings(Settings):
    """What survives."""

    save_steps: int | None = option(None, aliases=("save_interval", "save_every"), ge=1)
    """Steps between checkpoints; without it a tenth of the run. The last step is always saved."""

    save_total_limit: int = option(3, ge=1)
    """Newest checkpoints kept; the best one is kept besides."""

    metric_for_best_model: str = option(
        "loss", spellings={"eval_loss": "loss", "validation_loss": "loss", "val_loss": "loss", "eval_bpb": "bpb", "eval_accuracy": "accuracy"}
    )
    """The evaluation metric that picks the best checkpoint: the lowest loss or bpb, the highest accuracy or top5_accuracy,
    or a metric of an objective of one's own."""

    resume_from_checkpoint: str | None = option(None, aliases=("resume_from",))
    """Continue from this checkpoint instead of the run's newest one."""

    asynchronous: bool = option(False, aliases=("async_save",))
    """Training goes on while a checkpoint is written; a step waits only for the copy (which takes memory once more)."""

    checkpoint_dir: str | None = option(None, aliases=("save_dir",))
    """Where checkpoints go; default `checkpoints` inside the run."""
