"""The whole configuration as frozen dataclasses.

A field without a default is required. The text under a field says what it means and its unit.
Checks inside one section live in its ``__post_init__``; checks across sections in validate.py.
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
    """What this run is called, where it writes and how long it goes on."""

    name: str
    """Name of the run; shown in the console, the report and wandb."""
    output_dir: str
    """Run folder; metrics, checkpoints, samples and the report go here."""
    num_steps: int
    """Rollout-and-update steps in total, resumed ones counted in."""
    rollout_only: bool = False
    """Sample, grade and record (metrics.keep_rollouts_every), and learn nothing."""
    seed: int = 0
    """Seed of data order, sampling and every other random choice."""
    hang_timeout_s: float | None = None
    """Seconds without any progress after which a run says which ranks others wait for, with their stacks, and ends;
    null: five sixths of parallel.timeout_minutes, after which collectives fail; 0: never."""
    stop_margin_s: float | None = 300.0
    """Seconds before the end of its Slurm job at which a run saves and stops by itself; null: only when asked."""

    def __post_init__(self) -> None:
        require(self.num_steps >= 0, "run.num_steps", self.num_steps, "0 or more")
        require(bool(self.output_dir), "run.output_dir", repr(self.output_dir), "a folder name")
        before, stuck = self.stop_margin_s, self.hang_timeout_s
        require(before is None or before > 0, "run.stop_margin_s", before, "null, or more than 0 seconds")
        require(stuck is None or stuck >= 0, "run.hang_timeout_s", stuck, "null, 0 (never), or more seconds")


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The policy's model."""

    path: str
    """Hugging Face checkpoint folder (config.json, safetensors, tokenizer), or one converted to Megatron."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Compute type of the policy; bf16 keeps fp32 master weights in the optimizer."""
    implementation: Literal["auto", "local", "transformer_engine"] = "auto"
    """Modules of a layer; auto: Transformer Engine where it can be used, Megatron-Core's own otherwise."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run needs to know."""

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
        """The same with a frozen reward model in the policy's place, in its layout."""
        return replace(
            self,
            model=replace(self.model, path=path),
            lora=LoraSection(),
            moe=MoeSection(router_dtype=self.moe.router_dtype),
        )

    def for_critic(self) -> "RunConfig":
        """The same with the critic's model, layout and optimizer in the policy's place.

        All of its weights learn, and nothing balances its experts.
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
