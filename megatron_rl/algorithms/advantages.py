"""Advantages: of whole responses from the rewards of a step, and of tokens from what a response earned later."""

import math
from collections.abc import Callable, Mapping, Sequence
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


def grpo_advantages(rewards: Tensor, groups: Tensor, settings: AdvantageSettings) -> Tensor:
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


def process_advantages(
    step_rewards: Sequence[Mapping[int, float]], settings: AdvantageSettings
) -> list[dict[int, float]]:
    """Rewards of steps against those of all steps of the group; a token's advantage is the sum of those from it on.

    Args:
        step_rewards: of each sibling, by the token that ends a step.

    Returns:
        the same with the mean of all taken away and divided by their standard deviation if asked; 0 for a single step.

    Source: GRPO with process supervision, DeepSeekMath (arXiv 2402.03300) section 4.1.3; ``rewards_to_go`` sums them.
    """
    all_ = torch.tensor([reward for steps in step_rewards for reward in steps.values()], dtype=torch.float64)
    if all_.numel() < 2:
        return [dict.fromkeys(steps, 0.0) for steps in step_rewards]
    mean = float(all_.mean())
    divisor = float(all_.std()) + settings.epsilon if settings.normalize_by_std else 1.0
    return [{place: (reward - mean) / divisor for place, reward in steps.items()} for steps in step_rewards]


def rewards_to_go(rewards: Mapping[int, float], mask: Tensor) -> Tensor:
    """[L] float32: what is earned at each token of the mask [L] and after it."""
    earned = torch.zeros(mask.shape)
    for place, reward in rewards.items():
        earned[place] += reward
    return _to_go(earned, mask)


ADVANTAGES: dict[str, AdvantageFunction] = {
    "grpo": grpo_advantages,
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
    return _to_go(penalties, mask)


@dataclass(frozen=True, kw_only=True)
class GaeSettings:
    """Discounts of generalised advantage estimation."""

    gamma: float
    """Of what comes a token later."""
    lam: float
    """Of the errors of values a token later; 1: returns as they were, without the critic's opinion of later tokens."""
    turn_gamma: float
    """Of what comes a turn later, where turns are told apart."""
    turn_lam: float
    """Of the errors of values a turn later."""


TokenAdvantageFunction = Callable[[Tensor, Tensor, Tensor, GaeSettings], tuple[Tensor, Tensor]]
"""(rewards [L], values [L], mask [L], settings) -> (advantages [L], returns [L]) of one sequence.

Rewards are counted at the tokens that earned them, values are what the critic expected before each token, the mask
(bool) is true at the tokens that the policy sampled. Returns are what the critic is to expect. Both are 0 outside of
the mask."""


def gae(rewards: Tensor, values: Tensor, mask: Tensor, settings: GaeSettings) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over tokens; what others say in between costs no discount.

    Shapes as of TokenAdvantageFunction.

    Source: arXiv 1506.02438 eq. 16, with a value of 0 after the last token.
    """
    places = mask.nonzero().flatten()
    advantages = _estimate(rewards[places], values[places], settings.gamma, settings.lam)
    return _at(places, advantages, mask), _at(places, advantages + values[places], mask)


def turn_gae(rewards: Tensor, values: Tensor, mask: Tensor, settings: GaeSettings) -> tuple[Tensor, Tensor]:
    """That estimation with a whole turn for one action: all of its tokens have its advantage and its return.

    A turn is a run of tokens that the policy sampled, valued by what the critic expected before its first token.
    Shapes as of TokenAdvantageFunction.

    Source: turn-level credit assignment, arXiv 2505.11821 section 3; its turns' rewards are summed here.
    """
    spans = turns(mask)
    earned = torch.stack([rewards[start:stop].sum() for start, stop in spans]) if spans else rewards[:0]
    expected = values[[start for start, _ in spans]]
    of_turns = _estimate(earned, expected, settings.turn_gamma, settings.turn_lam)
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for (start, stop), advantage, value in zip(spans, of_turns, expected, strict=True):
        advantages[start:stop], returns[start:stop] = advantage, advantage + value
    return advantages, returns


def bi_level_gae(rewards: Tensor, values: Tensor, mask: Tensor, settings: GaeSettings) -> tuple[Tensor, Tensor]:
    """Estimation over turns at the last token of each, and from there back over the tokens of the turn.

    Where a turn ends is read off the mask and never off the rewards. Shapes as of TokenAdvantageFunction.

    Source: RAGEN, arXiv 2504.20073, bi-level GAE.
    """
    spans = turns(mask)
    ends = [stop - 1 for _, stop in spans]
    of_turns = _estimate(rewards[ends], values[ends], settings.turn_gamma, settings.turn_lam)
    advantages = torch.zeros_like(values)
    for (start, stop), last in zip(spans, of_turns, strict=True):
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
    """[start, stop) of every run of true entries of [L] bool."""
    edges = torch.nn.functional.pad(mask.int(), (1, 1)).diff()
    return list(zip((edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist(), strict=True))


def _estimate(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """[K] advantages of K actions in a row."""
    later = torch.cat([values[1:], torch.zeros_like(values[:1])])
    return _discounted(rewards + gamma * later - values, gamma * lam, 0.0)


def _discounted(deltas: Tensor, factor: float, following: float) -> Tensor:
    """[K]: each plus the factor times what comes of the next one, ``following`` after the last."""
    found = []
    for delta in reversed(deltas.tolist()):
        following = delta + factor * following
        found.append(following)
    return torch.tensor(found[::-1], dtype=deltas.dtype)


def _to_go(values: Tensor, mask: Tensor) -> Tensor:
    """[L] sums of the values [L] from each token of the mask on."""
    return torch.where(mask, values.flip(0).cumsum(0).flip(0), 0.0)


def _at(places: Tensor, found: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros_like(mask, dtype=found.dtype).index_copy(0, places, found)


def distillation_advantages(old_logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor) -> Tensor:
    """How much likelier the teacher finds each token than the policy that sampled it: minus k1 of the reverse KL.

    Args:
        old_logprobs: [L] of the sampling policy.
        teacher_logprobs: [L].
        mask: [L] bool, tokens that the policy sampled.

    Returns:
        [L], 0 outside of the mask; a token answers for itself alone.

    Source: on-policy distillation, GKD (arXiv 2306.13649) with the reverse KL, MiniLLM (arXiv 2306.08543) eq. 2 without
    the terms of later tokens.
    """
    return torch.where(mask, -k1(old_logprobs, teacher_logprobs), 0.0)


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
