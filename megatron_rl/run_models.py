"""The models of a run."""

from dataclasses import dataclass

from megatron_rl.mcore.critic import Critic
from megatron_rl.mcore.learner import Learner
from megatron_rl.mcore.policy import Policy
from megatron_rl.mcore.reference import BaseReference, HostedReference
from megatron_rl.mcore.scoring import ScoringModel

Reference = HostedReference | ScoringModel | BaseReference


@dataclass(frozen=True)
class RunModels:
    """Those that learn, and the one that does not."""

    policy: Policy
    reference: Reference | None
    """To which the KL divergence is taken; None where none is."""
    critic: Critic | None
    """None where the advantages need no values."""

    @property
    def learners(self) -> dict[str, Learner]:
        """Those that learn, by the names of their checkpoints."""
        found = {"policy": self.policy.learner}
        return found if self.critic is None else {**found, "critic": self.critic.learner}
