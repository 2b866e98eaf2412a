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
    "LanguageModelConfig": "treadle.models.base:LanguageModelConfig",
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
    "StreamingDataset": "treadle.data.pipeline:StreamingDataset",
    "TokenMixer": "treadle.layers.token_mixers:TokenMixer",
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

if TYPE_CHECKING:  # `as` is what hands a name on to type checkers (PEP 484)
    from treadle.data.base import Dataset as Dataset
    from treadle.data.base import create_dataloader as create_dataloader
    from treadle.data.batch import Batch as Batch
    from treadle.data.deduplication import ExactDeduplication as ExactDeduplication
    from treadle.data.deduplication import NearDeduplication as NearDeduplication
    from treadle.data.generated import GeneratedDataset as GeneratedDataset
    from treadle.data.pipeline import DataPipeline as DataPipeline
    from treadle.data.pipeline import StreamingDataset as StreamingDataset
    from treadle.data.transforms import BatchedMap as BatchedMap
    from treadle.data.transforms import Filter as Filter
    from treadle.data.transforms import Map as Map
    from treadle.data.transforms import MaximumLength as MaximumLength
    from treadle.data.transforms import MinimumLength as MinimumLength
    from treadle.distillation import DistillationTrainer as DistillationTrainer
    from treadle.distillation import student_of as student_of
    from treadle.evaluation.evaluator import Evaluator as Evaluator
    from treadle.layers.dynamics import INLDynamics as INLDynamics
    from treadle.layers.state import LayerState as LayerState
    from treadle.layers.state import State as State
    from treadle.layers.token_mixers import TokenMixer as TokenMixer
    from treadle.library import Model as Model
    from treadle.library import architectures as architectures
    from treadle.library import autocast as autocast
    from treadle.library import count_params as count_params
    from treadle.library import enable_checkpointing as enable_checkpointing
    from treadle.library import estimate_memory as estimate_memory
    from treadle.library import load as load
    from treadle.library import loss as loss
    from treadle.library import memory_usage as memory_usage
    from treadle.library import plan as plan
    from treadle.library import print_summary as print_summary
    from treadle.library import recommend_config as recommend_config
    from treadle.library import summary as summary
    from treadle.library import train as train
    from treadle.models.base import Capabilities as Capabilities
    from treadle.models.base import LanguageModelConfig as LanguageModelConfig
    from treadle.models.base import ModelConfig as ModelConfig
    from treadle.models.base import Output as Output
    from treadle.models.base import build as build
    from treadle.models.compress import compress_cache as compress_cache
    from treadle.models.pretrained import from_pretrained as from_pretrained
    from treadle.objectives.base import Losses as Losses
    from treadle.objectives.base import LossTerm as LossTerm
    from treadle.objectives.base import Metric as Metric
    from treadle.objectives.base import Objective as Objective
    from treadle.objectives.next_token import NextToken as NextToken
    from treadle.recipe import from_leaf_names
    from treadle.settings import Settings as Settings
    from treadle.settings import option as option
    from treadle.text.base import Tokenizer as Tokenizer
    from treadle.training.callbacks.base import Callback as Callback
    from treadle.training.trainer import Trainer as Trainer

    TrainConfig = from_leaf_names


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"treadle has no {name!r}; there is: {', '.join(sorted(_PLACES))}")
    import importlib

    module, _, attribute = _PLACES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
