"""Advantage estimators: of responses, from the rewards of a step, and of tokens, from the later rewards."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.algorithms.kl import k1


@dataclass(frozen=True, kw_only=True)
class AdvantageSettings:
    """Settings of the advantage functions of responses."""

    normalize_by_std: bool = True
    """Divide by the standard deviation of the group (GRPO does, Dr. GRPO does not)."""
    epsilon: float = 1e-4
    """Added to the standard deviation (1e-4 in TRL, 1e-6 in verl, 1e-8 in oat)."""
    pass_k: int = 1
    """k of pass@k, in samples."""


AdvantageFunction = Callable[[Tensor, Tensor, AdvantageSettings], Tensor]
"""(rewards [N], groups [N], settings) -> advantages [N].

Rewards are float; NaN marks a failed reward, which is left out of the group and gets advantage 0. Groups are int64,
the same for all samples of a prompt. The advantages have the dtype of the rewards."""


def grpo_advantages(rewards: Tensor, groups: Tensor, settings: AdvantageSettings) -> Tensor:
    """Reward minus the mean of its group, divided by the group's standard deviation with ``normalize_by_std``.

    Shapes as in AdvantageFunction; 0 for a group with one valid member.

    Source: GRPO, DeepSeekMath (arXiv 2402.03300) section 4.1.2; the deviation is Bessel-corrected as in TRL and verl.
    Dr. GRPO, arXiv 2503.20783, drops the division.
    """

    def group_advantages(members: Tensor) -> Tensor:
        centred = members - members.mean()
        return centred / (members.std() + settings.epsilon) if settings.normalize_by_std else centred

    return _by_group(rewards, groups, group_advantages)


def leave_one_out_advantages(rewards: Tensor, groups: Tensor, settings: AdvantageSettings) -> Tensor:
    """Reward minus the mean reward of the other samples of its group.

    Shapes as in AdvantageFunction; 0 for a group with one valid member.

    Source: RLOO, arXiv 2402.14740 section 3.2; Kool et al., 2019.
    """
    return _by_group(rewards, groups, lambda members: members - (members.sum() - members) / (members.numel() - 1))


def reward_advantages(rewards: Tensor, groups: Tensor, settings: AdvantageSettings) -> Tensor:
    """The reward itself, as in REINFORCE and REINFORCE++. Shapes as in AdvantageFunction.

    Source: Williams, 1992; REINFORCE++, arXiv 2501.03262, which then whitens the advantages over the batch.
    """
    return rewards.nan_to_num(0.0)


def pass_at_k_advantages(rewards: Tensor, groups: Tensor, settings: AdvantageSettings) -> Tensor:
    """Contribution of a sample to the probability that one of k samples is correct (pass@k), in closed form.

    A sample is correct if its reward is 1 or more, and wrong otherwise. The pass@k reward of a subset of k samples of
    the group is 1 if it has a correct sample, else 0. The advantage of a sample is the mean pass@k reward of the
    subsets with that sample minus the mean over all subsets, divided by the standard deviation over all subsets.
    Shapes as in AdvantageFunction; 0 if all samples are correct, all are wrong, or there are no more than k.

    Source: pass@k training, arXiv 2508.10751 section 2.4 (analytical derivation).
    """
    k = settings.pass_k

    def group_advantages(members: Tensor) -> Tensor:
        count, is_correct = members.numel(), members >= 1
        if count <= k:
            return torch.zeros_like(members)
        num_wrong = count - int(is_correct.sum())
        mean = 1 - math.comb(num_wrong, k) / math.comb(count, k)
        std = math.sqrt(mean * (1 - mean))
        if not std:  # every subset has a correct sample, or none has
            return torch.zeros_like(members)
        mean_with_wrong = 1 - math.comb(num_wrong - 1, k - 1) / math.comb(count - 1, k - 1)
        return torch.full_like(members, mean_with_wrong - mean).masked_fill(is_correct, 1 - mean) / std

    return _by_group(rewards, groups, group_advantages)


def process_advantages(
    step_rewards: Sequence[Mapping[int, float]], settings: AdvantageSettings
) -> list[dict[int, float]]:
    """Rewards of reasoning steps, normalised over all steps of the group.

    The advantage of a token is the sum of the results from that token on, by ``rewards_to_go``.

    Args:
        step_rewards: for each sample of the group, index of the last token of a step -> reward of the step.
        settings: whether to divide by the standard deviation, and its epsilon.

    Returns:
        The rewards minus the mean of all, divided by their standard deviation with ``normalize_by_std``; 0 if the group
        has a single step.

    Source: GRPO with process supervision, DeepSeekMath (arXiv 2402.03300) section 4.1.3.
    """
    all_rewards = torch.tensor([reward for steps in step_rewards for reward in steps.values()], dtype=torch.float64)
    if all_rewards.numel() < 2:
        return [dict.fromkeys(steps, 0.0) for steps in step_rewards]
    mean = float(all_rewards.mean())
    divisor = float(all_rewards.std()) + settings.epsilon if settings.normalize_by_std else 1.0
    return [{position: (reward - mean) / divisor for position, reward in steps.items()} for steps in step_rewards]


def rewards_to_go(rewards: Mapping[int, float], mask: Tensor) -> Tensor:
    """Sum of the rewards at each token and after it, [L] float32.

    Args:
        rewards: token index -> reward.
        mask: [L] bool; the result is 0 outside the mask.
    """
    dense = torch.zeros(mask.shape)
    for position, reward in rewards.items():
        dense[position] += reward
    return _to_go(dense, mask)


ADVANTAGES: dict[str, AdvantageFunction] = {
    "grpo": grpo_advantages,
    "rloo": leave_one_out_advantages,
    "reinforce": reward_advantages,
    "pass_at_k": pass_at_k_advantages,
}


def kl_penalty_to_go(old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, coef: float) -> Tensor:
    """Sum of the KL penalties, coef times k1, at each token and after it, to be subtracted from its return.

    Args:
        old_logprobs: [L], of the policy before the update.
        ref_logprobs: [L], of the reference model.
        mask: [L] bool, tokens that the policy sampled.
        coef: coefficient of the KL penalty.

    Returns:
        [L], 0 outside the mask.

    Source: the per-token KL reward of InstructGPT (arXiv 2203.02155); REINFORCE++, arXiv 2501.03262 eq. 5 and 6.
    """
    penalties = torch.where(mask, coef * k1(old_logprobs, ref_logprobs), 0.0)
    return _to_go(penalties, mask)


@dataclass(frozen=True, kw_only=True)
class GaeSettings:
    """Discount factors and lambdas of generalised advantage estimation."""

    gamma: float
    """Discount factor per token."""
    lam: float
    """GAE lambda per token; 1: Monte Carlo returns, without the critic's values of later tokens."""
    turn_gamma: float
    """Discount factor per turn, for estimators that separate turns."""
    turn_lam: float
    """GAE lambda per turn."""


TokenAdvantageFunction = Callable[[Tensor, Tensor, Tensor, GaeSettings], tuple[Tensor, Tensor]]
"""(rewards [L], values [L], mask [L], settings) -> (advantages [L], returns [L]) of one sequence.

Rewards are at the tokens that earned them, values are the critic's before each token, the mask (bool) is true at the
tokens that the policy sampled. Returns are the critic's targets. Both results are 0 outside the mask."""


def gae(rewards: Tensor, values: Tensor, mask: Tensor, settings: GaeSettings) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the policy's tokens; tokens of the environment are not discounted.

    Shapes as in TokenAdvantageFunction.

    Source: arXiv 1506.02438 eq. 16, with a value of 0 after the last token.
    """
    positions = mask.nonzero().flatten()
    advantages = _estimate(rewards[positions], values[positions], settings.gamma, settings.lam)
    return _scatter(positions, advantages, mask), _scatter(positions, advantages + values[positions], mask)


def turn_gae(rewards: Tensor, values: Tensor, mask: Tensor, settings: GaeSettings) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over turns; all tokens of a turn have its advantage and its return.

    A turn is a run of consecutive tokens that the policy sampled; its value is the critic's before its first token, its
    reward the sum over its tokens. Shapes as in TokenAdvantageFunction.

    Source: turn-level credit assignment, arXiv 2505.11821 section 3.
    """
    spans = turns(mask)
    turn_rewards = torch.stack([rewards[start:stop].sum() for start, stop in spans]) if spans else rewards[:0]
    turn_values = values[[start for start, _ in spans]]
    turn_advantages = _estimate(turn_rewards, turn_values, settings.turn_gamma, settings.turn_lam)
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for (start, stop), advantage, value in zip(spans, turn_advantages, turn_values, strict=True):
        advantages[start:stop], returns[start:stop] = advantage, advantage + value
    return advantages, returns


def bi_level_gae(rewards: Tensor, values: Tensor, mask: Tensor, settings: GaeSettings) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the last tokens of the turns, then backwards over the tokens of each turn.

    Turns end where the mask says so, whatever the rewards are. Shapes as in TokenAdvantageFunction.

    Source: RAGEN, arXiv 2504.20073, bi-level GAE.
    """
    spans = turns(mask)
    ends = [stop - 1 for _, stop in spans]
    turn_advantages = _estimate(rewards[ends], values[ends], settings.turn_gamma, settings.turn_lam)
    advantages = torch.zeros_like(values)
    for (start, stop), last in zip(spans, turn_advantages, strict=True):
        inner = slice(start, stop - 1)
        deltas = rewards[inner] + settings.gamma * values[start + 1 : stop] - values[inner]
        advantages[stop - 1] = last
        advantages[inner] = _discounted(deltas, settings.gamma * settings.lam, float(last))
    return advantages, torch.where(mask, advantages + values, 0.0)


TOKEN_ADVANTAGES: dict[str, TokenAdvantageFunction] = {
    "gae": gae,
    "turn_gae": turn_gae,
    "bi_level_gae": bi_level_gae,
}


def turns(mask: Tensor) -> list[tuple[int, int]]:
    """[start, stop) of every run of true entries of a mask, [L] bool."""
    edges = torch.nn.functional.pad(mask.int(), (1, 1)).diff()
    return list(zip((edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist(), strict=True))


def _estimate(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """GAE advantages [K] of K consecutive actions."""
    next_values = torch.cat([values[1:], torch.zeros_like(values[:1])])
    return _discounted(rewards + gamma * next_values - values, gamma * lam, 0.0)


def _discounted(deltas: Tensor, factor: float, following: float) -> Tensor:
    """Sums [K] of each delta and ``factor`` times the next sum; ``following`` is the sum after the last."""
    sums = []
    for delta in reversed(deltas.tolist()):
        following = delta + factor * following
        sums.append(following)
    return torch.tensor(sums[::-1], dtype=deltas.dtype)


def _to_go(values: Tensor, mask: Tensor) -> Tensor:
    """Sums [L] of the values [L] at each token and after it; 0 outside the mask."""
    return torch.where(mask, values.flip(0).cumsum(0).flip(0), 0.0)


def _scatter(positions: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Values [K] at K positions of a tensor of the mask's shape, 0 elsewhere."""
    return torch.zeros_like(mask, dtype=values.dtype).index_copy(0, positions, values)


def distillation_advantages(old_logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each token under the teacher minus the policy's: minus k1 of the reverse KL.

    Args:
        old_logprobs: [L], of the policy before the update.
        teacher_logprobs: [L], of the teacher.
        mask: [L] bool, tokens that the policy sampled.

    Returns:
        [L], 0 outside the mask; the advantage of a token does not include later tokens.

    Source: on-policy distillation, GKD (arXiv 2306.13649) with the reverse KL, MiniLLM (arXiv 2306.08543) eq. 2 without
    the terms of later tokens.
    """
    return torch.where(mask, -k1(old_logprobs, teacher_logprobs), 0.0)


def whiten(values: Tensor, mean: float, variance: float) -> Tensor:
    """Subtract a mean and divide by the root of a variance, which gives mean 0 and variance 1 over all values.

    Args:
        values: any shape.
        mean: of all values.
        variance: of all values, Bessel-corrected.

    Source: TRL and verl, with their 1e-8 under the root.
    """
    return (values - mean) / math.sqrt(variance + 1e-8)


def count_zero_variance_groups(rewards: Tensor, groups: Tensor) -> int:
    """Number of groups whose reward std is 0, because all valid rewards are equal or none is valid.

    Args:
        rewards: [N] float, NaN where the reward failed.
        groups: [N] int64, the group of each sample.
    """
    count = 0
    for group in groups.unique().tolist():
        members = rewards[(groups == group) & ~rewards.isnan()]
        count += int(members.numel() == 0 or bool((members == members[0]).all()))
    return count


def _by_group(rewards: Tensor, groups: Tensor, group_advantages: Callable[[Tensor], Tensor]) -> Tensor:
    """Advantages [N] from a function of the valid rewards of each group; 0 in groups with fewer than two."""
    advantages, valid = torch.zeros_like(rewards), ~rewards.isnan()
    for group in groups.unique().tolist():
        members = valid & (groups == group)
        if int(members.sum()) >= 2:
            advantages[members] = group_advantages(rewards[members])
    return advantages
