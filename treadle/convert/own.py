"""Configurations whose words treadle knows (recipe.py, and the aliases beside each key): read as `treadle train FILE` reads them.

What is here beside that is how their Python scripts say it, and why some of their words have no equivalent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from treadle.convert.reading import Reading, listed
from treadle.convert.script import Script
from treadle.monitor.settings import Sink
from treadle.recipe import recipe_layer, vocabulary
from treadle.settings import plain

# Words of those trainers that no key holds, and what there is instead.
WHY = {
    "use_token_routed_mlp": "there are no experts here; the MLP is dense",
    "num_experts": "there are no experts here; the MLP is dense",
    "num_experts_per_tok": "there are no experts here; the MLP is dense",
    "use_flash_attention": "the fastest exact kernel is always taken; train.attention_backend names one",
    "use_sdpa": "the fastest exact kernel is always taken; train.attention_backend names one",
    "pin_memory": "batches are pinned where the device needs it",
    "persistent_workers": "workers always stay",
    "drop_last": "every row is trained on; the last step of an epoch takes rows of the next",
    "eval_only": "that is a verb: treadle eval RUN",
    "push_to_hub": "that is a verb: treadle export RUN, then upload the folder",
    "tracking_uri": f"report_to has {listed(get_args(Sink))}",
    "cudnn_benchmark": "results would differ from run to run",
    "allow_tf32": "precision says what matrices are multiplied in",
    "logging_level": "the log says what happened; --help of each verb lists what can be silenced",
    "save_optimizer": "the optimiser is always saved, so that a run goes on exactly",
    "keep_best": "the best checkpoint is always kept: RUN@best",
}


def read_table(kind: str, path: Path) -> Reading:
    """A JSON, YAML or TOML file, with what `treadle train FILE` adds to it (the run's name; an experiment's last evaluation)."""
    return Reading(kind, dict(recipe_layer(path).table))


def read_constants(kind: str, script: Script) -> Reading:
    """A script's constants, argument classes and flags; its kind is the architecture where it names none."""
    reading = Reading(kind)
    names = set(vocabulary().all_names())
    constants = {name: value for name, value in script.constants.items() if plain(name) in names or name not in script.used}
    values: dict[str, Any] = {**script.flags, **constants}
    for own in script.arguments.values():
        values.update(own)
    known = {plain(name) for name in values}
    for name, value in values.items():
        reading.put(plain(name), value, name)
    if not known & {"arch", "architecture", "model_type", "model_size", "preset"}:
        reading.put("model.arch", kind)
    if not known & {"run_name", "experiment_name"}:
        reading.put("run.run_name", script.path.stem)
    reading.leave_computed(script.computed)
    reading.start = script.base_model
    return reading
