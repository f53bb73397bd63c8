"""Advantages: of whole responses from the rewards of a step, and of tokens from what a response earned later."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.algorithms.kl import k1


@dataclass(frozen=True, kw_only=True)
class AdvantageSettings:
    """What some of the functions need to know."""

    normalize_by_std: bool = True
    """GRPO divides by the group's standard deviation; Dr. GRPO does not."""
    epsilon: float = 1e-4
    """Added to that standard deviation (1e-4 in TRL, 1e-6 in verl, 1e-8 in oat)."""
    pass_k: int = 1
    """Samples of which one has to be right."""


AdvantageFunction = Callable[[Tensor, Tensor, AdvantageSettings], Tensor]
"""(rewards [N], groups [N], settings) -> advantages [N].

Rewards are float, NaN marks a failed one, which neither counts nor gets an advantage: its own is 0. Groups are int64,
equal for siblings. The result has the rewards' dtype."""


def group_advantages(rewards: Tensor, groups: Tensor, settings: AdvantageSettings) -> Tensor:
    """Reward minus the mean of its group, divided by the group's standard deviation if asked.

    Shapes as of AdvantageFunction; 0 for a group with one valid member.

    Source: GRPO, DeepSeekMath (arXiv 2402.03300) section 4.1.2; the deviation is Bessel-corrected as in TRL and verl.
    Dr. GRPO, arXiv 2503.20783, drops the division.
    """

    def of_group(members: Tensor) -> Tensor:
        centred = members - members.mean()
        return centred / (members.std() + settings.epsilon) if settings.normalize_by_std else centred

    return _by_group(rewards, groups, of_group)


def leave_one_out_advantages(rewards: Tensor, groups: Tensor, settings: AdvantageSettings) -> Tensor:
    """Reward minus the mean of its siblings' rewards.

    Shapes as of AdvantageFunction; 0 for a group with one valid member.

    Source: RLOO, arXiv 2402.14740 section 3.2; Kool et al., 2019.
    """
    return _by_group(rewards, groups, lambda members: members - (members.sum() - members) / (members.numel() - 1))


def reward_advantages(rewards: Tensor, groups: Tensor, settings: AdvantageSettings) -> Tensor:
    """The reward itself, which REINFORCE and REINFORCE++ begin with. Shapes as of AdvantageFunction.

    Source: Williams, 1992; REINFORCE++, arXiv 2501.03262, which whitens what comes of it over the batch.
    """
    return rewards.nan_to_num(0.0)


def pass_at_k_advantages(rewards: Tensor, groups: Tensor, settings: AdvantageSettings) -> Tensor:
    """What a sample does for the chance that one of k samples is right, in closed form.

    A sample is right when its reward is 1 or more; all others are wrong. Its advantage is the mean, over all subsets
    of k siblings with it, of whether the subset has a right one, minus the mean over all subsets, divided by the
    standard deviation of that. Shapes as of AdvantageFunction; 0 where all are right or all are wrong, or where there
    are no more than k.

    Source: pass@k training, arXiv 2508.10751 section 2.4 (analytical derivation).
    """
    k = settings.pass_k

    def of_group(members: Tensor) -> Tensor:
        count, right = members.numel(), members >= 1
        if count <= k:
            return torch.zeros_like(members)
        wrong = count - int(right.sum())
        mean = 1 - math.comb(wrong, k) / math.comb(count, k)
        deviation = math.sqrt(mean * (1 - mean))
        if not deviation:  # all are right, or so many that every subset has a right one, or all are wrong
            return torch.zeros_like(members)
        of_wrong = 1 - math.comb(wrong - 1, k - 1) / math.comb(count - 1, k - 1)
        return torch.full_like(members, of_wrong - mean).masked_fill(right, 1 - mean) / deviation

    return _by_group(rewards, groups, of_group)


ADVANTAGES: dict[str, AdvantageFunction] = {
    "group": group_advantages,
    "rloo": leave_one_out_advantages,
    "reinforce": reward_advantages,
    "pass_at_k": pass_at_k_advantages,
}


def kl_penalty_to_go(old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, coef: float) -> Tensor:
    """What a KL penalty in the reward takes from each token's return: coef times k1, from the token on.

    Args:
        old_logprobs: [L] of the sampling policy.
        ref_logprobs: [L].
        mask: [L] bool, tokens that the policy sampled.

    Returns:
        [L], 0 outside of the mask.

    Source: the per-token KL reward of InstructGPT (arXiv 2203.02155); REINFORCE++, arXiv 2501.03262 eq. 5 and 6.
    """
    penalties = torch.where(mask, coef * k1(old_logprobs, ref_logprobs), 0.0)
    return torch.where(mask, penalties.flip(0).cumsum(0).flip(0), 0.0)


def whiten(values: Tensor, mean: float, variance: float) -> Tensor:
    """Values of mean 0 and variance 1, if mean and (Bessel-corrected) variance are those of all of them.

    Shapes: any. Source: TRL and verl, with their 1e-8 under the root.
    """
    return (values - mean) / math.sqrt(variance + 1e-8)


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


def _by_group(rewards: Tensor, groups: Tensor, of_group: Callable[[Tensor], Tensor]) -> Tensor:
    """What a function makes of the valid rewards of each group that has at least two."""
    advantages, valid = torch.zeros_like(rewards), ~rewards.isnan()
    for group in groups.unique().tolist():
        members = valid & (groups == group)
        if int(members.sum()) >= 2:
            advantages[members] = of_group(rewards[members])
    return advantages
