"""treadle: one trainer for every sequence architecture.

The public names load on first use, so that importing treadle costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from treadle.version import __version__ as __version__

_PLACES = {
    "Batch": "treadle.data.batch:Batch",
    "BatchedMap": "treadle.data.transforms:BatchedMap",
    "Callback": "treadle.training.callbacks.base:Callback",
    "Capabilities": "treadle.models.base:Capabilities",
    "DataPipeline": "treadle.data.pipeline:DataPipeline",
    "Dataset": "treadle.data.base:Dataset",
    "DistillationTrainer": "treadle.distillation:DistillationTrainer",
    "Evaluator": "treadle.evaluation.evaluator:Evaluator",
    "ExactDeduplication": "treadle.data.deduplication:ExactDeduplication",
    "Filter": "treadle.data.transforms:Filter",
    "GeneratedDataset": "treadle.data.generated:GeneratedDataset",
    "INLDynamics": "treadle.layers.dynamics:INLDynamics",
    "LayerState": "treadle.layers.state:LayerState",
    "LossTerm": "treadle.objectives.base:LossTerm",
    "Losses": "treadle.objectives.base:Losses",
    "Map": "treadle.data.transforms:Map",
    "MaximumLength": "treadle.data.transforms:MaximumLength",
    "Metric": "treadle.objectives.base:Metric",
    "MinimumLength": "treadle.data.transforms:MinimumLength",
    "Model": "treadle.library:Model",
    "ModelConfig": "treadle.models.base:ModelConfig",
    "NearDeduplication": "treadle.data.deduplication:NearDeduplication",
    "NextToken": "treadle.objectives.next_token:NextToken",
    "Objective": "treadle.objectives.base:Objective",
    "Output": "treadle.models.base:Output",
    "Settings": "treadle.settings:Settings",
    "State": "treadle.layers.state:State",
    "Tokenizer": "treadle.text.base:Tokenizer",
    "TrainConfig": "treadle.recipe:from_leaf_names",
    "Trainer": "treadle.training.trainer:Trainer",
    "architectures": "treadle.library:architectures",
    "autocast": "treadle.library:autocast",
    "build": "treadle.models.base:build",
    "compress_cache": "treadle.models.compress:compress_cache",
    "count_params": "treadle.library:count_params",
    "create_dataloader": "treadle.data.base:create_dataloader",
    "enable_checkpointing": "treadle.library:enable_checkpointing",
    "estimate_memory": "treadle.library:estimate_memory",
    "from_pretrained": "treadle.models.pretrained:from_pretrained",
    "load": "treadle.library:load",
    "loss": "treadle.library:loss",
    "memory_usage": "treadle.library:memory_usage",
    "option": "treadle.settings:option",
    "plan": "treadle.library:plan",
    "print_summary": "treadle.library:print_summary",
    "recommend_config": "treadle.library:recommend_config",
    "student_of": "treadle.distillation:student_of",
    "summary": "treadle.library:summary",
    "train": "treadle.library:train",
}
__all__ = [*_PLACES]

if TYPE_CHECKING:
    from treadle.data.base import Dataset, create_dataloader
    from treadle.data.batch import Batch
    from treadle.data.deduplication import ExactDeduplication, NearDeduplication
    from treadle.data.generated import GeneratedDataset
    from treadle.data.pipeline import DataPipeline
    from treadle.data.transforms import BatchedMap, Filter, Map, MaximumLength, MinimumLength
    from treadle.distillation import DistillationTrainer, student_of
    from treadle.evaluation.evaluator import Evaluator
    from treadle.layers.dynamics import INLDynamics
    from treadle.layers.state import LayerState, State
    from treadle.library import (
        Model,
        architectures,
        autocast,
        count_params,
        enable_checkpointing,
        estimate_memory,
        load,
        loss,
        memory_usage,
        plan,
        print_summary,
        recommend_config,
        summary,
        train,
    )
    from treadle.models.base import Capabilities, ModelConfig, Output, build
    from treadle.models.compress import compress_cache
    from treadle.models.pretrained import from_pretrained
    from treadle.objectives.base import Losses, LossTerm, Metric, Objective
    from treadle.objectives.next_token import NextToken
    from treadle.recipe import from_leaf_names as TrainConfig
    from treadle.settings import Settings, option
    from treadle.text.base import Tokenizer
    from treadle.training.callbacks.base import Callback
    from treadle.training.trainer import Trainer


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"treadle has no {name!r}; there is: {', '.join(sorted(_PLACES))}")
    import importlib

    module, _, attribute = _PLACES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
