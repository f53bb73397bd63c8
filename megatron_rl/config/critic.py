"""The critic of PPO: where it comes from, how it is laid out and how it learns."""

from dataclasses import dataclass, field

from megatron_rl.config.checks import require
from megatron_rl.config.optimizer import OptimizerSection
from megatron_rl.config.parallel import ParallelSection


@dataclass(frozen=True, kw_only=True)
class CriticSection:
    """The model that values tokens for algorithm.advantage=gae, turn_gae and bi_level_gae."""

    path: str | None = None
    """Folder that it begins with: any model with the policy's tokenizer, a reward model (score.weight) or another
    critic; without score.weight the values begin at 0. null: model.path."""
    parallel: ParallelSection | None = None
    """How it is split over the ranks; null: as the policy."""
    optimizer: OptimizerSection = field(default_factory=lambda: OptimizerSection(lr=1e-5))
    """Its own; usually faster than the policy's."""
    clip_value: float | None = None
    """How far a value may go from what it was before the updates of a step (0.2 is usual); null: anywhere."""
    warmup_steps: int = 0
    """First steps, in which it learns alone and the policy stays as it is."""

    def __post_init__(self) -> None:
        clip = self.clip_value
        require(clip is None or clip > 0, "critic.clip_value", clip, "null, or more than 0")
        require(self.warmup_steps >= 0, "critic.warmup_steps", self.warmup_steps, "0 or more")
