"""Hugging Face and PEFT folders of the models that train, and the reference models that a run keeps."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from megatron_rl.mcore.learner import Learner
from megatron_rl.mcore.lora import LoraAdapters
from megatron_rl.mcore.sharded_model import ShardedModel
from megatron_rl.models import as_value_model, read_hf_config


class Export(NamedTuple):
    """A model as Hugging Face reads it."""

    model: ShardedModel
    config: Mapping[str, Any] | None
    """Its config.json; None: that of the folder that it began with."""


class LearningModels(Protocol):
    """What a checkpoint needs to know of the models of a run."""

    @property
    def learners(self) -> Mapping[str, Learner]:
        """Those that learn, by the names of their parts of a checkpoint."""
        ...

    @property
    def exports(self) -> Mapping[str, Export]:
        """Those that are written for Hugging Face, by the names of their folders."""
        ...

    @property
    def adapters(self) -> LoraAdapters | None:
        """What learns in place of a model's weights, if anything does."""
        ...


def value_export(model: ShardedModel) -> Export:
    """A model of one output as a sequence classification model of one label."""
    return Export(model, as_value_model(read_hf_config(model.config.model.path)))
