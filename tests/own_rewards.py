"""Reward functions for tests, in a file of their own because reward workers import it and must start quickly."""

import time
from pathlib import Path

from megatron_rl.rewards.types import RewardInput


def digit_share(sample: RewardInput) -> float:
    """Share of digits in the response: a dense reward."""
    return sum(c.isdigit() for c in sample.response) / max(1, len(sample.response))


def slow_digit_share(sample: RewardInput, hold: str = "") -> float:
    """``digit_share``, slow enough to disturb a run meanwhile; does not return while the file ``hold`` exists."""
    time.sleep(0.03)
    while hold and Path(hold).exists():
        time.sleep(0.05)
    return digit_share(sample)


def marked_digit_share(sample: RewardInput, mark: str) -> float:
    """``digit_share``; each call creates the file ``mark``."""
    Path(mark).touch()
    return digit_share(sample)


def begins_with_a_digit(sample: RewardInput) -> float:
    """1 if the response begins with a digit, else 0."""
    return float(sample.response[:1].isdigit())


def raises(sample: RewardInput) -> float:
    """Raise an exception."""
    raise ZeroDivisionError("this reward is broken")


def hangs_on(sample: RewardInput, response: str = "hang") -> float:
    """1, except that it never returns for one response."""
    while sample.response == response:
        time.sleep(0.1)
    return 1.0


def exits(sample: RewardInput) -> float:
    """End the process of the reward worker."""
    raise SystemExit(3)


def nothing(sample: RewardInput) -> None:
    """Return None, as a function without a return statement does."""
