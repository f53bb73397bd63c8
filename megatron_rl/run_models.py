"""The models of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from megatron_rl.mcore.critic import Critic
from megatron_rl.mcore.learner import Learner
from megatron_rl.mcore.lora import LoraAdapters
from megatron_rl.mcore.policy import Policy
from megatron_rl.mcore.reference import BaseReference, HostedReference
from megatron_rl.mcore.reward_model import RewardModel
from megatron_rl.mcore.scoring import ScoringModel
from megatron_rl.mcore.sharded_model import ShardedModel
from megatron_rl.models import as_value_model, read_hf_config

Reference = HostedReference | ScoringModel | BaseReference


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


@dataclass(frozen=True)
class RunModels:
    """Those that learn, and those that do not."""

    policy: Policy
    reference: Reference | None
    """To which the KL divergence is taken; None where none is."""
    critic: Critic | None
    """None where the advantages need no values."""
    reward_model: RewardModel | None
    """Whose scores are added to the rewards; None where rules say all."""

    @property
    def learners(self) -> Mapping[str, Learner]:
        found = {"policy": self.policy.learner}
        return found if self.critic is None else {**found, "critic": self.critic.learner}

    @property
    def exports(self) -> Mapping[str, Export]:
        found = {"hf": Export(self.policy, None)}
        return found if self.critic is None else {**found, "hf_critic": value_export(self.critic)}

    @property
    def adapters(self) -> LoraAdapters | None:
        return self.policy.adapters


@dataclass(frozen=True)
class RewardTrainingModels:
    """The one that learns to reward."""

    reward_model: RewardModel
    learner: Learner

    @property
    def learners(self) -> Mapping[str, Learner]:
        return {"reward_model": self.learner}

    @property
    def exports(self) -> Mapping[str, Export]:
        return {"hf": value_export(self.reward_model)}

    @property
    def adapters(self) -> LoraAdapters | None:
        return None


def value_export(model: ShardedModel) -> Export:
    """A model of one output as a sequence classification model of one label."""
    return Export(model, as_value_model(read_hf_config(model.config.model.path)))
