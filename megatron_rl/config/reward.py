"""Reward functions and reward models."""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_rl.config.checks import positive, require


@dataclass(frozen=True, kw_only=True)
class RewardFunctionSection:
    """One reward function and its weight in the sum."""

    name: str
    """A registered name, or package.module:symbol."""
    weight: float = 1.0
    """Factor in the total reward."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the function."""


@dataclass(frozen=True, kw_only=True)
class RewardModelSection:
    """A model that scores what the policy sampled, in the policy's layout."""

    path: str
    """Hugging Face folder with score.weight and the policy's tokenizer, as megatron_rl.train_reward_model writes it."""
    weight: float = 1.0
    """Factor in the total reward."""
    step_separator: str | None = None
    """Text between steps, of each of which the end is scored (a process reward model); null: only the last token is."""
    aggregation: Literal["min", "prod", "last", "mean", "each"] = "min"
    """What the scores of steps make of a response; each: every step earns its own at its end, and their sum counts."""
    activation: Literal["none", "sigmoid"] = "none"
    """none: the score as it is; sigmoid: the probability, for models of right and wrong."""

    def __post_init__(self) -> None:
        require(self.step_separator != "", "reward.model.step_separator", "''", "null, or a text")
        require(
            self.aggregation == "min" or self.step_separator is not None,
            "reward.model.aggregation",
            self.aggregation,
            "nothing without reward.model.step_separator",
        )
        require(
            self.aggregation != "prod" or self.activation == "sigmoid",
            "reward.model.activation",
            self.activation,
            "sigmoid with reward.model.aggregation=prod, which multiplies probabilities",
        )


@dataclass(frozen=True, kw_only=True)
class RewardSection:
    """What a response is worth."""

    functions: list[RewardFunctionSection] = field(default_factory=list)
    """The total reward is the weighted sum of these."""
    model: RewardModelSection | None = None
    """A model whose score is added to it in training; null: none."""
    num_workers: int = 1
    """Worker processes on each rank."""
    timeout_s: float = 10.0
    """Hard limit for the reward of one response, in seconds; the worker is killed beyond it."""
    memory_limit_gb: float = 4.0
    """Address-space limit of a worker, in GiB."""
    max_failure_fraction: float = 0.1
    """Stop the run when a larger share of one step's rewards raise or time out."""

    def __post_init__(self) -> None:
        positive("reward", self, "num_workers")
        require(self.timeout_s > 0, "reward.timeout_s", self.timeout_s, "more than 0 seconds")
        require(self.memory_limit_gb > 0, "reward.memory_limit_gb", self.memory_limit_gb, "more than 0")
        require(0 <= self.max_failure_fraction <= 1, "reward.max_failure_fraction", self.max_failure_fraction, "0 to 1")
