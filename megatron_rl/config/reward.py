"""Configuration of reward functions and reward models."""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_rl.config.checks import positive, require


@dataclass(frozen=True, kw_only=True)
class RewardFunctionSection:
    """One reward function and its weight in the total reward."""

    name: str
    """Reward function: a registered name, or package.module:symbol."""
    weight: float = 1.0
    """Weight of the function's value in the total reward."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the reward function."""


@dataclass(frozen=True, kw_only=True)
class RewardModelSection:
    """A reward model that scores the policy's responses, in the policy's parallel layout."""

    path: str
    """Hugging Face folder of the reward model, with score.weight and the policy's tokenizer, as
    megatron_rl.train_reward_model writes it."""
    weight: float = 1.0
    """Weight of the reward model's score in the total reward."""
    step_separator: str | None = None
    """Text that separates the reasoning steps of a response; the model then scores the last token of every step
    (process reward model). null: it scores the last token of the response only."""
    aggregation: Literal["min", "prod", "last", "mean", "each"] = "min"
    """Reward of a response from the scores of its steps. min, prod, last, mean: minimum, product, last one or mean,
    earned at the last token; each: every step earns its own score at its last token, and the reward is their sum."""
    activation: Literal["none", "sigmoid"] = "none"
    """Function applied to the scores. none: unchanged; sigmoid: probability, for models trained on labels of correct
    and wrong."""

    def __post_init__(self) -> None:
        require(self.step_separator != "", "reward.model.step_separator", "''", "null, or a text")
        require(
            self.aggregation == "min" or self.step_separator is not None,
            "reward.model.aggregation",
            self.aggregation,
            "min, the default, without reward.model.step_separator",
        )
        require(
            self.aggregation != "prod" or self.activation == "sigmoid",
            "reward.model.activation",
            self.activation,
            "sigmoid with reward.model.aggregation=prod, which multiplies probabilities",
        )


@dataclass(frozen=True, kw_only=True)
class RewardSection:
    """Reward of a response."""

    functions: list[RewardFunctionSection] = field(default_factory=list)
    """Reward functions; the total reward is the weighted sum of their values."""
    model: RewardModelSection | None = None
    """Reward model whose weighted score is added to the total reward in training; null: none."""
    num_workers: int = 1
    """Reward worker processes on each rank."""
    timeout_s: float = 10.0
    """Hard time limit for the reward of one response, in seconds; beyond it the worker is killed."""
    memory_limit_gb: float = 4.0
    """Address-space limit of a reward worker, in GiB."""
    max_failure_fraction: float = 0.1
    """Largest fraction, from 0 to 1, of a step's rewards that may raise an error or time out; beyond it the run
    stops."""

    def __post_init__(self) -> None:
        positive("reward", self, "num_workers")
        require(self.timeout_s > 0, "reward.timeout_s", self.timeout_s, "more than 0 seconds")
        require(self.memory_limit_gb > 0, "reward.memory_limit_gb", self.memory_limit_gb, "more than 0")
        require(0 <= self.max_failure_fraction <= 1, "reward.max_failure_fraction", self.max_failure_fraction, "0 to 1")
