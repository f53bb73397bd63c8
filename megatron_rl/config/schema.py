"""The whole configuration as frozen dataclasses.

A field without a default is required. The text under a field says what it means and its unit.
Checks inside one section live in its ``__post_init__``; checks across sections in validate.py.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_rl.config.algorithm import AlgorithmSection
from megatron_rl.config.batching import BatchingSection
from megatron_rl.config.checks import positive, require
from megatron_rl.config.critic import CriticSection
from megatron_rl.config.data import DataSection
from megatron_rl.config.lora import LoraSection
from megatron_rl.config.optimizer import OptimizerSection
from megatron_rl.config.parallel import MoeSection, ParallelSection
from megatron_rl.config.performance import MemorySection, PrecisionSection, ProfilingSection
from megatron_rl.config.reward import RewardFunctionSection, RewardSection
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
    stuck_after_s: float | None = None
    """Seconds without any progress after which a run says which ranks others wait for, with their stacks, and ends;
    null: five sixths of parallel.timeout_minutes, after which collectives fail; 0: never."""
    stop_before_end_s: float | None = 300.0
    """Seconds before the end of its Slurm job at which a run saves and stops by itself; null: only when asked."""

    def __post_init__(self) -> None:
        require(self.num_steps >= 0, "run.num_steps", self.num_steps, "0 or more")
        require(bool(self.output_dir), "run.output_dir", repr(self.output_dir), "a folder name")
        before, stuck = self.stop_before_end_s, self.stuck_after_s
        require(before is None or before > 0, "run.stop_before_end_s", before, "null, or more than 0 seconds")
        require(stuck is None or stuck >= 0, "run.stuck_after_s", stuck, "null, 0 (never), or more seconds")


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
class EvaluationSection:
    """Evaluation on data.evaluation during the run."""

    every: int = 0
    """Evaluate after every so many steps; 0: only before the first and after the last."""
    num_prompts: int | None = None
    """Use the first so many held-out prompts; null: all."""
    temperature: float = 0.0
    """0 is greedy decoding."""
    max_new_tokens: int | None = None
    """Longest response; null: rollout.max_new_tokens."""
    functions: list[RewardFunctionSection] = field(default_factory=list)
    """Reward functions that grade; empty: reward.functions."""
    suite: str | None = None
    """File of a suite of benchmarks (configs/eval), answered by the training engine; null: none."""
    suite_every: int = 0
    """Put the suite to the policy after every so many steps; 0: only before the first and after the last."""

    def __post_init__(self) -> None:
        require(self.every >= 0, "evaluation.every", self.every, "0 (off) or more")
        require(self.suite_every >= 0, "evaluation.suite_every", self.suite_every, "0 (off) or more")
        no_schedule = self.suite is not None or self.suite_every == 0
        require(no_schedule, "evaluation.suite_every", self.suite_every, "0, or evaluation.suite beside it")
        require(self.temperature >= 0, "evaluation.temperature", self.temperature, "0 (greedy) or more")
        positive("evaluation", self, "num_prompts", "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """Saving; resuming is asked for by --resume on the command line."""

    every: int = 0
    """Save after every so many steps; 0: only after the last."""
    keep_last: int = 2
    """Older checkpoints are removed beyond so many."""
    in_background: bool = False
    """Write while training goes on; costs a copy of this rank's share in host memory."""
    verify: bool = True
    """Compare the files' hashes on resume; sizes are always compared."""
    save_hf: bool = False
    """Also write the weights as a Hugging Face folder into each checkpoint."""

    def __post_init__(self) -> None:
        require(self.every >= 0, "checkpoint.every", self.every, "0 (off) or more")
        positive("checkpoint", self, "keep_last")


@dataclass(frozen=True, kw_only=True)
class MetricsSection:
    """Where metrics go; metrics.jsonl in the run folder is always written."""

    console: Literal["auto", "live", "plain", "silent"] = "auto"
    """auto: live on a terminal, plain lines elsewhere."""
    tensorboard: bool = True
    """Write tensorboard events into the run folder."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online when a key is set, offline otherwise."""
    wandb_project: str = "megatron_rl"
    """Project on wandb."""
    log_every: int = 1
    """Print a console line every so many steps; files get every step."""
    num_samples: int = 4
    """Rollouts kept for the report at each evaluation."""
    keep_rollouts_every: int = 0
    """Write all rollouts of every so many steps to rollouts/step_*.jsonl; 0: of none."""

    def __post_init__(self) -> None:
        require(
            self.keep_rollouts_every >= 0, "metrics.keep_rollouts_every", self.keep_rollouts_every, "0 (off) or more"
        )
        positive("metrics", self, "log_every")
        require(self.num_samples >= 0, "metrics.num_samples", self.num_samples, "0 or more")


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
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    metrics: MetricsSection = field(default_factory=MetricsSection)
    profiling: ProfilingSection = field(default_factory=ProfilingSection)

    def of_reward_model(self, path: str) -> "RunConfig":
        """The same with a frozen reward model in the policy's place, in its layout."""
        return replace(
            self,
            model=replace(self.model, path=path),
            lora=LoraSection(),
            moe=MoeSection(router_dtype=self.moe.router_dtype),
        )

    def of_critic(self) -> "RunConfig":
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
