"""A trained reward model as a part of the reward."""

from dataclasses import dataclass
from typing import Literal

from megatron_rl.config.checks import require


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
