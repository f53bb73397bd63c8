"""Configuration of python -m megatron_rl.train_reward_model."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_rl.config.batching import BatchingSection
from megatron_rl.config.checks import positive, require
from megatron_rl.config.data import DataSection, RowsSection, SourceSection
from megatron_rl.config.optimizer import OptimizerSection
from megatron_rl.config.parallel import ParallelSection
from megatron_rl.config.performance import MemorySection, PrecisionSection
from megatron_rl.config.periodic import CheckpointSection, MetricsSection
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.config.schema import (
    ModelSection,
    RunConfig,
    RunSection,
)
from megatron_rl.config.validate import check_decay, check_parallel
from megatron_rl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RewardDataSection:
    """Labelled responses for training and validation."""

    schema: Literal["pairwise", "pointwise", "stepwise", "math_shepherd"]
    """Columns of the rows, as in public data sets. pairwise: chosen, rejected, optionally prompt and margin; pointwise:
    prompt, completion, label; stepwise: prompt, completions, labels; math_shepherd: input and label with a mark at the
    end of each step."""
    train: RowsSection
    """Source of the training rows."""
    validation: RowsSection | None = None
    """Source of the held-out rows; null: none."""
    num_examples_per_step: int = 64
    """Batch size: rows per optimizer update."""
    max_tokens: int = 2048
    """Longest prompt and response together, in tokens; longer rows are dropped, counted and reported."""
    step_separator: str = "\n"
    """Text that is inserted between the steps of a response with schema=stepwise and math_shepherd."""
    chat_template: Literal["auto", "rendered", "none"] = "auto"
    """auto: apply the tokenizer's chat template if it has one; rendered: the chat template has been applied already, as
    in the output of tools/data/label_steps.py; none: prompts are plain text."""
    shuffle: bool = True
    """true: shuffle rows anew every epoch, seeded by run.seed; false: keep the order of the source."""

    def __post_init__(self) -> None:
        positive("data", self, "num_examples_per_step", "max_tokens")
        require(bool(self.step_separator), "data.step_separator", repr(self.step_separator), "a text")


@dataclass(frozen=True, kw_only=True)
class RewardValidationSection:
    """Validation on data.validation during the run."""

    every: int = 0
    """Interval of validation, in steps; 0: only before the first and after the last step."""

    def __post_init__(self) -> None:
        require(self.every >= 0, "validation.every", self.every, "0 (off) or more")


@dataclass(frozen=True, kw_only=True)
class RewardTrainingConfig:
    """The whole configuration of the training of a reward model."""

    run: RunSection
    model: ModelSection
    data: RewardDataSection
    parallel: ParallelSection = field(default_factory=ParallelSection)
    batching: BatchingSection = field(default_factory=BatchingSection)
    precision: PrecisionSection = field(default_factory=PrecisionSection)
    memory: MemorySection = field(default_factory=MemorySection)
    optimizer: OptimizerSection = field(default_factory=lambda: OptimizerSection(lr=1e-5))
    validation: RewardValidationSection = field(default_factory=RewardValidationSection)
    checkpoint: CheckpointSection = field(default_factory=lambda: CheckpointSection(save_hf=True))
    metrics: MetricsSection = field(default_factory=MetricsSection)

    def as_run(self) -> RunConfig:
        """Return the run configuration that the code shared with policies (model, optimizer, checkpoints) reads."""
        return RunConfig(
            run=self.run,
            model=self.model,
            data=DataSection(train=SourceSection(kind="jsonl", path="-"), max_prompt_tokens=self.data.max_tokens),
            parallel=self.parallel,
            rollout=RolloutSection(source="demonstrations"),
            batching=self.batching,
            precision=self.precision,
            memory=self.memory,
            optimizer=self.optimizer,
            checkpoint=self.checkpoint,
            metrics=self.metrics,
        )


def validate_reward_training(config: RewardTrainingConfig, world_size: int) -> None:
    """Check that the sections agree with each other and with the number of ranks.

    Raises:
        ConfigError: they do not; names the values, what was expected and the key to change.
    """
    check_parallel(config.as_run(), world_size)
    check_decay(config.optimizer)
    unused: dict[str, tuple[object, object]] = {
        "run.rollout_only": (config.run.rollout_only, False),
        "batching.num_mini_batches": (config.batching.num_mini_batches, 1),
        "batching.num_epochs": (config.batching.num_epochs, 1),
        "batching.logprob_chunk_tokens": (config.batching.logprob_chunk_tokens, None),
        "memory.offload": (list(config.memory.offload), []),
        "metrics.keep_rollouts_every": (config.metrics.keep_rollouts_every, 0),
    }
    for key, (value, default) in unused.items():
        require(value == default, key, value, f"{default}, because reward-model training does not use this key")
    has_steps = config.data.schema in ("stepwise", "math_shepherd")
    separator, sequences = config.data.step_separator, config.batching.micro_batch_size
    require(
        has_steps or separator == "\n",
        "data.step_separator",
        repr(separator),
        f"its default with data.schema={config.data.schema}, which has no steps",
    )
    require(
        config.data.schema != "pairwise" or sequences is None or sequences % 2 == 0,
        "batching.micro_batch_size",
        sequences,
        "an even number with data.schema=pairwise, because the two sequences of a pair share a micro-batch",
    )
    tokens = config.batching.max_tokens_per_micro_batch * config.parallel.context_parallel_size
    rows = 2 if config.data.schema == "pairwise" else 1
    if tokens < rows * (config.data.max_tokens + 1):
        raise ConfigError(
            f"batching.max_tokens_per_micro_batch={config.batching.max_tokens_per_micro_batch} is too small for "
            f"{rows} sequence(s) of data.max_tokens + 1 = {config.data.max_tokens + 1} tokens. Raise it to at least "
            f"{-(-rows * (config.data.max_tokens + 1) // config.parallel.context_parallel_size)}."
        )
    if config.validation.every and config.data.validation is None:
        raise ConfigError(
            f"validation.every={config.validation.every} needs held-out rows. "
            "Set data.validation, or validation.every=0."
        )
