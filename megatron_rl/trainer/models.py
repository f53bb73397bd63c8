"""The models of a run."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rl.checkpointing.export import Export, value_export
from megatron_rl.mcore.critic import Critic
from megatron_rl.mcore.learner import Learner
from megatron_rl.mcore.logprob_model import LogProbModel
from megatron_rl.mcore.lora import LoraAdapters
from megatron_rl.mcore.policy import Policy
from megatron_rl.mcore.reference import AdapterFreeReference, HostReference
from megatron_rl.mcore.reward_model import RewardModel

Reference = HostReference | LogProbModel | AdapterFreeReference


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
