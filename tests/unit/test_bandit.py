"""GRPO on a bandit with two arms: one pays 0.1 always, the other pays 1 with probability 1/4.

Dividing by the reward std of small groups makes the first arm look better; subtracting the mean alone does not.
"""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from megatron_rl.algorithms.advantages import AdvantageSettings, grpo_advantages
from megatron_rl.algorithms.losses import Clip, LossInputs, ppo_clip_loss

SAFE_REWARD, WIN_PROBABILITY = 0.1, 0.25


def expected_advantage_of_the_better_arm(group_size: int, *, normalize_by_std: bool) -> float:
    """Return the exact expected advantage in groups of which each half chose one arm."""
    half = group_size // 2
    total = 0.0
    for wins in range(half + 1):
        probability = math.comb(half, wins) * WIN_PROBABILITY**wins * (1 - WIN_PROBABILITY) ** (half - wins)
        rewards = torch.tensor([1.0] * wins + [0.0] * (half - wins) + [SAFE_REWARD] * half, dtype=torch.float64)
        settings = AdvantageSettings(normalize_by_std=normalize_by_std)
        advantages = grpo_advantages(rewards, torch.zeros(group_size, dtype=torch.int64), settings)
        total += probability * float(advantages[:half].mean())
    return total


def trained_probability(group_size: int, seed: int, *, normalize_by_std: bool) -> float:
    """Return the probability of the better arm after 150 training steps of 16 groups."""
    generator = torch.Generator().manual_seed(seed)
    logit = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logit], lr=0.1)
    groups = torch.arange(16).repeat_interleave(group_size)
    settings = AdvantageSettings(normalize_by_std=normalize_by_std)
    for _ in range(150):
        chosen, luck = torch.rand(2, groups.numel(), generator=generator, dtype=torch.float64)
        better = chosen < torch.sigmoid(logit.detach())
        rewards = torch.where(better, (luck < WIN_PROBABILITY).double(), SAFE_REWARD)
        logprobs = torch.where(better, logsigmoid(logit), logsigmoid(-logit))
        tokens = LossInputs(
            logprobs=logprobs,
            old_logprobs=logprobs.detach(),
            advantages=grpo_advantages(rewards, groups, settings),
            mean_of_response=lambda values: values,
        )
        optimizer.zero_grad()
        ppo_clip_loss(tokens, Clip()).loss.mean().backward()
        optimizer.step()
    return float(torch.sigmoid(logit.detach()))


@pytest.mark.parametrize(("group_size", "expected_with_std"), [(4, -0.272), (8, -0.069), (16, 0.122), (32, 0.207)])
def test_std_normalization_reverses_the_advantage_in_small_groups(group_size: int, expected_with_std: float) -> None:
    with_std = expected_advantage_of_the_better_arm(group_size, normalize_by_std=True)
    assert with_std == pytest.approx(expected_with_std, abs=5e-4)
    assert expected_advantage_of_the_better_arm(group_size, normalize_by_std=False) == pytest.approx(0.075)


@pytest.mark.parametrize("seed", range(4))
def test_training_follows_the_sign_of_the_expected_advantage(seed: int) -> None:
    assert trained_probability(8, seed, normalize_by_std=True) < 0.05
    assert trained_probability(16, seed, normalize_by_std=True) > 0.95
    assert trained_probability(8, seed, normalize_by_std=False) > 0.95
