"""The [checkpoint] section."""

from __future__ import annotations

from pydantic import field_validator

from treadle.settings import Settings, option
from treadle.storage.remote import is_url, refuse_secrets


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

    mirror: str | None = option(None)
    """A URL (s3://bucket/folder, gs://, hf://) under which the run's checkpoints and logs are copied, as URL/RUN, once they are whole on
    disk. The same command on another machine goes on from there."""

    @field_validator("mirror")
    @classmethod
    def _a_url(cls, mirror: str | None) -> str | None:
        if mirror is not None:
            if not is_url(mirror):
                raise ValueError(f"mirror = {mirror!r} is no URL; write s3://BUCKET/FOLDER (a folder of this machine: checkpoint_dir)")
            refuse_secrets(mirror)
        return mirror
