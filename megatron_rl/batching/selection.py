"""Select the groups and responses of a step that the policy is trained on.

Responses that a filter excludes keep their tokens and rewards and lose their loss mask.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from statistics import pstdev

import torch

from megatron_rl.config.algorithm import AlgorithmSection
from megatron_rl.types import Rollout, RolloutGroup


def select_groups(groups: Sequence[RolloutGroup], config: AlgorithmSection) -> Sequence[RolloutGroup]:
    """Apply the filters of the configuration: reward std, truncation, rejection sampling."""
    if config.top_std_fraction < 1:
        groups = top_std_groups(groups, config.num_kept(len(groups)))
    if config.mask_truncated:
        groups = without_truncated(groups)
    if config.accept_min_reward is not None:
        groups = accepted(
            groups,
            min_reward=config.accept_min_reward,
            max_per_prompt=config.accept_max_per_prompt,
            unique=config.accept_unique,
        )
    return groups


def without_truncated(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """Exclude responses that were cut at the length limit.

    Source: overlong filtering, DAPO, arXiv 2503.14476 section 3.4.
    """
    return [_mask_others(group, [rollout.finish_reason != "length" for rollout in group.rollouts]) for group in groups]


def accepted(
    groups: Sequence[RolloutGroup], *, min_reward: float, max_per_prompt: int | None, unique: bool
) -> list[RolloutGroup]:
    """Keep only responses with a high enough reward.

    Args:
        groups: groups of a step.
        min_reward: lowest reward of a response that is kept.
        max_per_prompt: keep at most this number of the best responses of a prompt, the earlier of equal rewards; None:
            all.
        unique: keep only the best of responses with the same text, the first of equal rewards.

    Source: rejection sampling fine-tuning, arXiv 2308.01825; best-of-n of RAFT, arXiv 2304.06767.
    """
    return [_mask_others(group, _select(group.rollouts, min_reward, max_per_prompt, unique)) for group in groups]


def top_std_groups(groups: Sequence[RolloutGroup], count: int) -> list[RolloutGroup]:
    """Keep the `count` groups with the highest reward std, in original order.

    Source: StarPO-S, RAGEN, arXiv 2504.20073 section 4.2.
    """
    kept = sorted(range(len(groups)), key=lambda index: -_reward_std(groups[index]))[:count]
    return [groups[index] for index in sorted(kept)]


def _reward_std(group: RolloutGroup) -> float:
    return pstdev([rollout.reward for rollout in group.rollouts if rollout.status == "ok"] or [0.0])


def num_trained_rollouts(groups: Sequence[RolloutGroup]) -> int:
    """Number of responses with loss."""
    return sum(_is_trained(rollout) for group in groups for rollout in group.rollouts)


def _select(rollouts: Sequence[Rollout], min_reward: float, max_per_prompt: int | None, unique: bool) -> list[bool]:
    taken: list[int] = []
    for index in sorted(range(len(rollouts)), key=lambda i: -_reward_or_lowest(rollouts[i])):
        is_repeated = unique and any(rollouts[other].text == rollouts[index].text for other in taken)
        if _reward_or_lowest(rollouts[index]) >= min_reward and not is_repeated:
            taken.append(index)
    kept: Collection[int] = taken[:max_per_prompt]
    return [index in kept for index in range(len(rollouts))]


def _reward_or_lowest(rollout: Rollout) -> float:
    """The reward; minus infinity for a response without loss."""
    return rollout.reward if _is_trained(rollout) else float("-inf")


def _is_trained(rollout: Rollout) -> bool:
    return rollout.status == "ok" and bool(rollout.loss_mask.any())


def _mask_others(group: RolloutGroup, is_kept: Sequence[bool]) -> RolloutGroup:
    rollouts = [
        rollout if keep else replace(rollout, loss_mask=torch.zeros_like(rollout.loss_mask))
        for rollout, keep in zip(group.rollouts, is_kept, strict=True)
    ]
    return replace(group, rollouts=rollouts)
