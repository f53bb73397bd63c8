"""Advantage estimators for tests."""

import os
import time
from typing import Any

import torch
from torch import Tensor

from megatron_rl.algorithms.advantages import AdvantageSettings, grpo_advantages


def hangs_on_the_second_rank(rewards: Tensor, *others: Any, **settings: Any) -> Tensor:
    """Group mean as baseline, except that rank 1 never returns."""
    if os.environ.get("RANK") == "1":
        time.sleep(10**6)
    return rewards - rewards.mean()


def with_noise(rewards: Tensor, groups: Tensor, settings: AdvantageSettings) -> Tensor:
    """GRPO's advantages and draws from torch's generator, so that they depend on its state."""
    return grpo_advantages(rewards, groups, settings) + 0.1 * torch.randn(rewards.shape)
