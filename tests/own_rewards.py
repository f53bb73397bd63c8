"""Reward functions of the tests; apart, because workers import this and must start quickly."""

import time
from pathlib import Path

from megatron_rl.rewards.types import RewardInput


def digit_share(sample: RewardInput) -> float:
    """A dense reward: the share of digits in the response."""
    return sum(c.isdigit() for c in sample.response) / max(1, len(sample.response))


def slow_digit_share(sample: RewardInput, hold: str = "") -> float:
    """The same, so slow that a run can be disturbed; not before the file ``hold`` is gone."""
    time.sleep(0.03)
    while hold and Path(hold).exists():
        time.sleep(0.05)
    return digit_share(sample)


def begins_with_a_digit(sample: RewardInput) -> float:
    """A verdict of 0 or 1."""
    return float(sample.response[:1].isdigit())


def raises(sample: RewardInput) -> float:
    """A reward with a fault."""
    raise ZeroDivisionError("this reward is broken")


def hangs_on(sample: RewardInput, response: str = "hang") -> float:
    """A reward that never answers for one response."""
    while sample.response == response:
        time.sleep(0.1)
    return 1.0


def exits(sample: RewardInput) -> float:
    """A reward that takes its process down."""
    raise SystemExit(3)


def nothing(sample: RewardInput) -> None:
    """A reward that forgets to return."""
