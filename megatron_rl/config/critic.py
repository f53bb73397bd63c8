"""Configuration of the critic (PPO's value model)."""

from dataclasses import dataclass, field

from megatron_rl.config.checks import require
from megatron_rl.config.optimizer import OptimizerSection
from megatron_rl.config.parallel import ParallelSection


@dataclass(frozen=True, kw_only=True)
class CriticSection:
    """The value model of algorithm.advantage=gae, turn_gae and bi_level_gae."""

    path: str | None = None
    """Hugging Face folder that initialises the critic: any model with the policy's tokenizer, a reward model or another
    critic; without score.weight in it all values are 0 at first. null: model.path."""
    parallel: ParallelSection | None = None
    """Parallel layout of the critic; null: the policy's layout."""
    optimizer: OptimizerSection = field(default_factory=lambda: OptimizerSection(lr=1e-5))
    """Optimizer of the critic; its learning rate is usually higher than the policy's."""
    clip_value: float | None = None
    """Value clipping: range around the value before the updates of a step within which the value loss follows a value
    (verl's cliprange_value; 0.2 is usual); null: no clipping."""
    warmup_steps: int = 0
    """Number of steps at the start of a run in which only the critic is trained (verl's critic_warmup)."""

    def __post_init__(self) -> None:
        clip = self.clip_value
        require(clip is None or clip > 0, "critic.clip_value", clip, "null, or more than 0")
        require(self.warmup_steps >= 0, "critic.warmup_steps", self.warmup_steps, "0 or more")
