"""Inputs of reward functions and results of the pool. Does not import torch, so that workers start fast."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class RewardInput:
    """One response to grade."""

    prompt: str
    response: str
    """Text of the response, without special tokens."""
    answer: str | None
    """The prompt's reference answer; None if it has none."""
    finish_reason: str
    """"stop", or "length" if the response was truncated."""
    num_tokens: int
    seed: int
    """Different for every sample of a run; for rewards that draw random numbers."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of the prompt's row."""


RewardFunction = Callable[..., float]
"""(sample: RewardInput, **options) -> float; anything but a finite number is an error."""


@dataclass(frozen=True, kw_only=True)
class RewardResult:
    """The grade of a response, or why there is none."""

    status: Literal["ok", "reward_error", "reward_timeout"]
    total: float
    """Weighted sum of the reward functions; NaN unless status is "ok"."""
    parts: Mapping[str, float]
    """Function name -> value before weighting."""
    message: str = ""
    """The error, unless status is "ok"."""
