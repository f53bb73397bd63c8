"""The models of a run."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rl.checkpointing.export import Export, value_export
from megatron_rl.distributed.collectives import raise_together
from megatron_rl.mcore.critic import Critic
from megatron_rl.mcore.learner import Learner
from megatron_rl.mcore.logprob_model import LogProbModel
from megatron_rl.mcore.lora import LoraAdapters
from megatron_rl.mcore.policy import Policy
from megatron_rl.mcore.reference import AdapterFreeReference, HostReference
from megatron_rl.mcore.reward_model import RewardModel
from megatron_rl.types import ParallelContext

Reference = HostReference | LogProbModel | AdapterFreeReference


@dataclass(frozen=True)
class RunModels:
    """The models of an RL run, trained and frozen."""

    policy: Policy
    reference: Reference | None
    """Reference (or teacher) that computes ``ref_logprobs``; None if the run needs none."""
    critic: Critic | None
    """None if the advantages need no values."""
    reward_model: RewardModel | None
    """Its scores are added to the rewards; None if all rewards come from reward functions."""

    @property
    def learners(self) -> Mapping[str, Learner]:
        learners = {"policy": self.policy.learner}
        return learners if self.critic is None else {**learners, "critic": self.critic.learner}

    @property
    def exports(self) -> Mapping[str, Export]:
        exports = {"hf": Export(self.policy, None)}
        return exports if self.critic is None else {**exports, "hf_critic": value_export(self.critic)}

    @property
    def adapters(self) -> LoraAdapters | None:
        return self.policy.adapters


@dataclass(frozen=True)
class RewardTrainingModels:
    """The model of a reward model training, with its learner."""

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


def load_reference(reference: Reference | None, path: str | None, parallel: ParallelContext) -> None:
    """Load the weights of an earlier policy into the reference, if the run has replaced it."""
    if reference is not None and path is not None:
        assert not isinstance(reference, AdapterFreeReference), "validate rejects resets of this reference"
        with raise_together(parallel):
            reference.load(path)
