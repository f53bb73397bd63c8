"""What a reward function reads and what the pool answers. No torch here: workers start quickly."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class RewardInput:
    """One response to grade."""

    prompt: str
    response: str
    """Without special tokens."""
    answer: str | None
    """The reference answer of the prompt."""
    finish_reason: str
    """"stop" or "length": a truncated response has no end."""
    num_tokens: int
    seed: int
    """Different for every sample of a run, for rewards that draw."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of the prompt's row."""


RewardFunction = Callable[..., float]
"""(sample: RewardInput, **options) -> float; anything but a finite number is an error."""


@dataclass(frozen=True, kw_only=True)
class RewardResult:
    """The graded response, or why there is no grade."""

    status: Literal["ok", "reward_error", "reward_timeout"]
    total: float
    """Weighted sum; NaN unless status is "ok"."""
    parts: Mapping[str, float]
    """Function name -> value before weighting."""
    message: str = ""
    """What went wrong."""
