"""Outcome advantages from the rewards of a step."""

from collections.abc import Callable

import torch
from torch import Tensor

AdvantageFunction = Callable[..., Tensor]
"""(rewards [N], groups [N], *, normalize_by_std, epsilon) -> advantages [N]."""


def group_advantages(rewards: Tensor, groups: Tensor, *, normalize_by_std: bool, epsilon: float) -> Tensor:
    """Reward minus the mean of its group, divided by the group's standard deviation if asked.

    Args:
        rewards: [N] float; NaN marks a failed reward, which neither counts nor gets an advantage.
        groups: [N] int64, equal for siblings.
        normalize_by_std: GRPO divides; Dr. GRPO does not.
        epsilon: added to the standard deviation (1e-4 in TRL, 1e-6 in verl).

    Returns:
        [N] of the rewards' dtype; 0 for failed rewards and for a group with one valid member.

    Source: GRPO, DeepSeekMath (arXiv 2402.03300) section 4.1.2; the deviation is Bessel-corrected
    as in TRL and verl. Dr. GRPO, arXiv 2503.20783, drops the division.
    """
    advantages = torch.zeros_like(rewards)
    valid = ~rewards.isnan()
    for group in groups.unique().tolist():
        members = valid & (groups == group)
        if int(members.sum()) < 2:
            continue
        centred = rewards[members] - rewards[members].mean()
        advantages[members] = centred / (rewards[members].std() + epsilon) if normalize_by_std else centred
    return advantages


ADVANTAGES: dict[str, AdvantageFunction] = {"group": group_advantages}


def count_zero_variance_groups(rewards: Tensor, groups: Tensor) -> int:
    """Groups whose valid rewards are all equal, so that they teach nothing.

    Args:
        rewards: [N] float, NaN where failed.
        groups: [N] int64.
    """
    count = 0
    for group in groups.unique().tolist():
        members = rewards[(groups == group) & ~rewards.isnan()]
        count += int(members.numel() == 0 or bool((members == members[0]).all()))
    return count
