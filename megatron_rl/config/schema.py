"""The configuration of a training run as frozen dataclasses.

A field without a default is required. The text under a field gives its meaning, unit and choices.
Checks within one section are in its ``__post_init__``; checks across sections are in validate.py.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_rl.config.algorithm import AlgorithmSection
from megatron_rl.config.batching import BatchingSection
from megatron_rl.config.checks import require
from megatron_rl.config.critic import CriticSection
from megatron_rl.config.data import DataSection
from megatron_rl.config.lora import LoraSection
from megatron_rl.config.optimizer import OptimizerSection
from megatron_rl.config.parallel import MoeSection, ParallelSection
from megatron_rl.config.performance import MemorySection, PrecisionSection, ProfilingSection
from megatron_rl.config.periodic import BenchmarksSection, CheckpointSection, MetricsSection, ValidationSection
from megatron_rl.config.reward import RewardSection
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.config.weight_sync import WeightSyncSection


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Name, output folder and length of a run."""

    name: str
    """Name of the run, shown in the console, the report and Weights & Biases (verl's experiment_name)."""
    output_dir: str
    """Run folder, for metrics, checkpoints, samples and the report (verl's default_local_dir)."""
    num_steps: int
    """Total number of training steps, each with rollouts and updates, including steps before a resume (verl's
    total_training_steps)."""
    rollout_only: bool = False
    """Generate, grade and record rollouts (metrics.keep_rollouts_every) without training."""
    seed: int = 0
    """Random seed of data order, sampling and every other random choice."""
    hang_timeout_s: float | None = None
    """Hang detection: seconds without progress on any rank after which the run reports the ranks that others wait for,
    with their stack traces, and ends; null: five sixths of parallel.timeout_minutes, at which collectives fail; 0:
    never."""
    stop_margin_s: float | None = 300.0
    """Seconds before the end of the run's Slurm job at which it saves a checkpoint and stops; null: never, it stops on
    a signal only."""

    def __post_init__(self) -> None:
        require(self.num_steps >= 0, "run.num_steps", self.num_steps, "0 or more")
        require(bool(self.output_dir), "run.output_dir", repr(self.output_dir), "a folder name")
        margin, timeout = self.stop_margin_s, self.hang_timeout_s
        require(margin is None or margin > 0, "run.stop_margin_s", margin, "null, or more than 0 seconds")
        require(
            timeout is None or timeout >= 0, "run.hang_timeout_s", timeout, "null, 0 (never), or more than 0 seconds"
        )


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The policy's model."""

    path: str
    """Folder of the model: a Hugging Face checkpoint (config.json, safetensors, tokenizer), or one converted to
    Megatron (TRL's model_name_or_path, slime's hf_checkpoint)."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Data type of weights and computation; with bf16 the optimizer keeps fp32 master weights."""
    implementation: Literal["auto", "local", "transformer_engine"] = "auto"
    """Implementation of the layers. local: Megatron-Core's own modules; transformer_engine: Transformer Engine's; auto:
    Transformer Engine if it can be used, local otherwise."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The whole configuration of a training run."""

    run: RunSection
    model: ModelSection
    data: DataSection
    parallel: ParallelSection = field(default_factory=ParallelSection)
    moe: MoeSection = field(default_factory=MoeSection)
    rollout: RolloutSection = field(default_factory=RolloutSection)
    weight_sync: WeightSyncSection = field(default_factory=WeightSyncSection)
    reward: RewardSection = field(default_factory=RewardSection)
    algorithm: AlgorithmSection = field(default_factory=AlgorithmSection)
    critic: CriticSection = field(default_factory=CriticSection)
    lora: LoraSection = field(default_factory=LoraSection)
    batching: BatchingSection = field(default_factory=BatchingSection)
    precision: PrecisionSection = field(default_factory=PrecisionSection)
    memory: MemorySection = field(default_factory=MemorySection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    validation: ValidationSection = field(default_factory=ValidationSection)
    benchmarks: BenchmarksSection = field(default_factory=BenchmarksSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    metrics: MetricsSection = field(default_factory=MetricsSection)
    profiling: ProfilingSection = field(default_factory=ProfilingSection)

    def for_reward_model(self, path: str) -> "RunConfig":
        """Return the configuration with a frozen reward model in place of the policy, in the policy's layout.

        Args:
            path: Hugging Face folder of the reward model.
        """
        return replace(
            self,
            model=replace(self.model, path=path),
            lora=LoraSection(),
            moe=MoeSection(router_dtype=self.moe.router_dtype),
        )

    def for_critic(self) -> "RunConfig":
        """Return the configuration with the critic's model, layout and optimizer in place of the policy's.

        All weights of the critic are trained, and its experts have no load-balancing loss.
        """
        critic = self.critic
        return replace(
            self,
            model=replace(self.model, path=critic.path or self.model.path),
            parallel=critic.parallel or self.parallel,
            optimizer=critic.optimizer,
            lora=LoraSection(),
            moe=MoeSection(router_dtype=self.moe.router_dtype),
        )
