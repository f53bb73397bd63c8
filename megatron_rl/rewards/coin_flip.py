"""A control: a reward that is independent of the response."""

import random

from megatron_rl.rewards.types import RewardInput


def coin_flip(sample: RewardInput, probability: float = 0.5) -> float:
    """Return 1 with the given probability, whatever the response. A run with this reward must not improve."""
    return float(random.Random(sample.seed).random() < probability)
