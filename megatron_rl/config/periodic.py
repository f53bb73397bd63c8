"""Configuration of validation, benchmarks, checkpoints and metrics."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_rl.config.checks import positive, require
from megatron_rl.config.reward import RewardFunctionSection


@dataclass(frozen=True, kw_only=True)
class ValidationSection:
    """Validation on the held-out prompts of data.validation during the run."""

    every: int = 0
    """Interval of validation, in steps (verl's test_freq, TRL's eval_steps); 0: only before the first and after the
    last step."""
    num_prompts: int | None = None
    """Number of held-out prompts to use, the first ones; null: all."""
    temperature: float = 0.0
    """Sampling temperature of validation; 0 is greedy decoding."""
    max_new_tokens: int | None = None
    """Longest validation response, in tokens; null: rollout.max_new_tokens."""
    functions: list[RewardFunctionSection] = field(default_factory=list)
    """Reward functions that grade validation responses; empty: reward.functions."""

    def __post_init__(self) -> None:
        require(self.every >= 0, "validation.every", self.every, "0 (off) or more")
        require(self.temperature >= 0, "validation.temperature", self.temperature, "0 (greedy) or more")
        positive("validation", self, "num_prompts", "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class BenchmarksSection:
    """Evaluation of the policy on a benchmark suite during the run."""

    suite: str | None = None
    """File of a benchmark suite (configs/eval); the rollout engine generates the responses. null: no benchmarks."""
    every: int = 0
    """Interval of the benchmark suite, in steps; 0: only before the first and after the last step."""

    def __post_init__(self) -> None:
        require(self.every >= 0, "benchmarks.every", self.every, "0 (off) or more")
        has_schedule = self.suite is not None or self.every == 0
        require(has_schedule, "benchmarks.every", self.every, "0 without benchmarks.suite")


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """Saving of checkpoints; resuming is chosen by --resume on the command line."""

    every: int = 0
    """Interval of checkpoints, in steps (verl's save_freq, TRL's save_steps); 0: only after the last step."""
    keep_last: int = 2
    """Number of checkpoints to keep, the newest ones; older ones are deleted (TRL's save_total_limit)."""
    in_background: bool = False
    """Asynchronous saving: write checkpoints while training continues (Megatron's async_save); costs host memory for a
    copy of the part that each rank saves."""
    verify: bool = True
    """Compare the hashes of the checkpoint files on resume; file sizes are always compared."""
    save_hf: bool = False
    """Also write the weights as a Hugging Face folder into every checkpoint."""

    def __post_init__(self) -> None:
        require(self.every >= 0, "checkpoint.every", self.every, "0 (off) or more")
        positive("checkpoint", self, "keep_last")


@dataclass(frozen=True, kw_only=True)
class MetricsSection:
    """Where metrics go; metrics.jsonl in the run folder is always written."""

    console: Literal["auto", "live", "plain", "silent"] = "auto"
    """Console output. live: a display that is updated in place; plain: lines; silent: none; auto: live on a terminal,
    plain elsewhere."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases mode. auto: online if an API key is set, offline otherwise."""
    wandb_project: str = "megatron_rl"
    """Weights & Biases project (verl's project_name)."""
    log_every: int = 1
    """Interval of console lines, in steps; metrics.jsonl, TensorBoard and Weights & Biases get every step."""
    num_samples: int = 4
    """Validation responses kept for the report at each validation, of the first prompts."""
    keep_rollouts_every: int = 0
    """Interval in steps at which all rollouts of a step are written to rollouts/step_*.jsonl in the run folder; 0:
    never."""

    def __post_init__(self) -> None:
        require(
            self.keep_rollouts_every >= 0, "metrics.keep_rollouts_every", self.keep_rollouts_every, "0 (off) or more"
        )
        positive("metrics", self, "log_every")
        require(self.num_samples >= 0, "metrics.num_samples", self.num_samples, "0 or more")
