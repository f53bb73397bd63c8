"""Two arms: 0.1 for sure, or 1 with probability 1/4. Dividing by the deviation of small groups makes the first look
better; the mean alone does not."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from megatron_rl.algorithms.advantages import AdvantageSettings, grpo_advantages
from megatron_rl.algorithms.losses import Clip, LossInputs, ppo_clip_loss

SURE, CHANCE = 0.1, 0.25


def expected_advantage_of_the_better_arm(group_size: int, *, normalize_by_std: bool) -> float:
    """Exactly, in groups of which one half chose each arm."""
    half = group_size // 2
    total = 0.0
    for wins in range(half + 1):
        probability = math.comb(half, wins) * CHANCE**wins * (1 - CHANCE) ** (half - wins)
        rewards = torch.tensor([1.0] * wins + [0.0] * (half - wins) + [SURE] * half, dtype=torch.float64)
        settings = AdvantageSettings(normalize_by_std=normalize_by_std)
        found = grpo_advantages(rewards, torch.zeros(group_size, dtype=torch.int64), settings)
        total += probability * float(found[:half].mean())
    return total


def learnt(group_size: int, seed: int, *, normalize_by_std: bool) -> float:
    """Probability of the better arm after 150 steps of 16 groups."""
    generator = torch.Generator().manual_seed(seed)
    logit = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logit], lr=0.1)
    groups = torch.arange(16).repeat_interleave(group_size)
    settings = AdvantageSettings(normalize_by_std=normalize_by_std)
    for _ in range(150):
        chosen, luck = torch.rand(2, groups.numel(), generator=generator, dtype=torch.float64)
        better = chosen < torch.sigmoid(logit.detach())
        rewards = torch.where(better, (luck < CHANCE).double(), SURE)
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


@pytest.mark.parametrize(("group_size", "by_std"), [(4, -0.272), (8, -0.069), (16, 0.122), (32, 0.207)])
def test_the_expectation_changes_its_sign_with_the_size_of_the_group(group_size: int, by_std: float) -> None:
    found = expected_advantage_of_the_better_arm(group_size, normalize_by_std=True)
    assert found == pytest.approx(by_std, abs=5e-4)
    assert expected_advantage_of_the_better_arm(group_size, normalize_by_std=False) == pytest.approx(0.075)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_learnt_has_that_sign(seed: int) -> None:
    assert learnt(8, seed, normalize_by_std=True) < 0.05
    assert learnt(16, seed, normalize_by_std=True) > 0.95
    assert learnt(8, seed, normalize_by_std=False) > 0.95
