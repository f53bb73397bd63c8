"""The control: a reward that says nothing about the response."""

import random

from megatron_rl.rewards.types import RewardInput


def coin_flip(sample: RewardInput, probability: float = 0.5) -> float:
    """1 with the given probability, whatever the response. A run on it must not improve."""
    return float(random.Random(sample.seed).random() < probability)
