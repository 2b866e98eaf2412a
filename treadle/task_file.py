"""`treadle train my_task.py`: one file that holds a model, its data and what is wanted of it, as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from treadle.errors import ConfigError
from treadle.foreign import advice, defines_nothing
from treadle.trusted_code import allow, load_file, place_of


def task_table(path: Path) -> dict[str, Any]:
    """The classes of a file (one Model, one Dataset, one Objective, each optional), and its `recipe`, a table with sections or
    dotted keys that flags override."""
    from treadle.data.base import Dataset
    from treadle.models.base import Model
    from treadle.objectives.base import Objective

    nothing = f"{path} holds no Model, Dataset or Objective of treadle, so there is nothing to train; {advice(path)}"
    if defines_nothing(path):  # not executed: it may be a script that starts something else
        raise ConfigError(nothing)
    allow(path)  # its name was typed
    module = load_file(path, "task")
    table: dict[str, Any] = {"run.run_name": path.stem}
    for key, base in (("model.arch", Model), ("data.dataset_class", Dataset), ("train.objective", Objective)):
        own = [thing for thing in vars(module).values()
               if isinstance(thing, type) and issubclass(thing, base) and thing.__module__ == module.__name__]  # fmt: skip
        leaves = [cls for cls in own if not any(cls is not other and issubclass(other, cls) for other in own)]
        if len(leaves) > 1:
            raise ConfigError(f"{path} has several classes on top of {base.__name__} ({', '.join(c.__name__ for c in leaves)}); "
                              f"say which: --{key} {path}:CLASS")  # fmt: skip
        if leaves:
            table[key] = place_of(leaves[0])
    if len(table) == 1:
        raise ConfigError(nothing)
    own_recipe = getattr(module, "recipe", {})
    if not isinstance(own_recipe, dict):
        raise ConfigError(f"{path}: recipe must be a table (a dict), not a {type(own_recipe).__name__}")
    return {**table, **own_recipe}
