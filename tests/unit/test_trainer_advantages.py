"""Advantages in the trainer: rewards of tokens and steps, critic estimates, and the selection of groups."""

import pytest
import torch

from megatron_rl.algorithms.advantages import (
    AdvantageSettings,
    GaeSettings,
    bi_level_gae,
    gae,
    process_advantages,
    rewards_to_go,
    turn_gae,
    turns,
)
from megatron_rl.algorithms.kl import adapted_coef
from megatron_rl.algorithms.losses import value_loss
from megatron_rl.batching.selection import top_std_groups
from megatron_rl.batching.sequences import rewards_by_token, to_sequence
from megatron_rl.metrics.metric import ExplainedVariance, explained_variance
from megatron_rl.rollout.serialization import read_rollouts, rollout_from_json, write_groups
from megatron_rl.types import Prompt, Rollout, RolloutGroup

MASK = torch.tensor([False, True, True, False, False, True, True, False])  # two turns


def rollout(reward: float = 1.0, step_rewards: dict[int, float] | None = None, status: str = "ok") -> Rollout:
    return Rollout(
        token_ids=torch.arange(8),
        loss_mask=MASK,
        rollout_logprobs=torch.zeros(8),
        text="",
        finish_reason="stop",
        policy_versions=MASK.int() - 1,
        seed=0,
        reward=reward,
        reward_parts={},
        status=status,  # type: ignore[arg-type]
        failure="",
        step_rewards=step_rewards or {},
    )


def group(index: int, rewards: list[float]) -> RolloutGroup:
    prompt = Prompt(prompt_id=str(index), token_ids=torch.arange(1), text="", answer=None)
    return RolloutGroup(index=index, prompt=prompt, rollouts=[rollout(reward) for reward in rewards])


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (rollout(1.0), {6: 1.0}),
        (rollout(1.0, {2: 0.25, 6: 0.75}), {2: 0.25, 6: 0.75}),
        (rollout(1.5, {2: 0.25, 6: 0.75}), {2: 0.25, 6: 1.25}),  # plus a reward of the whole response
        (rollout(0.5, {2: 0.5}), {2: 0.5}),
        (rollout(0.0), {6: 0.0}),
        (rollout(float("nan"), status="reward_error"), {}),
    ],
)
def test_rewards_are_at_the_last_token_of_the_response_or_step(sample: Rollout, expected: dict[int, float]) -> None:
    assert rewards_by_token(sample) == expected
    assert {position: x for position, x in enumerate(to_sequence(sample).rewards.tolist()) if x} == {
        position: x for position, x in expected.items() if x
    }


def test_step_rewards_are_saved_with_the_rollouts(tmp_path) -> None:  # type: ignore[no-untyped-def]
    sample = rollout(1.0, {2: 0.25, 6: 0.75})
    saved = RolloutGroup(index=0, prompt=group(0, []).prompt, rollouts=[sample])
    write_groups(tmp_path / "step.jsonl", 1, [saved])
    (line,) = read_rollouts(tmp_path / "step.jsonl")
    assert rollout_from_json(line).step_rewards == {2: 0.25, 6: 0.75}


def test_step_rewards_are_normalized_over_all_steps_of_the_group() -> None:
    """Check a worked example with one response of three steps and one of two."""
    steps = [{3: 1.0, 5: 0.0, 8: 1.0}, {4: 0.0, 6: 0.0}]
    values = torch.tensor([1.0, 0, 1, 0, 0])
    advantages = process_advantages(steps, AdvantageSettings(epsilon=1e-6))
    high, low = ((x - 0.4) / (float(values.std()) + 1e-6) for x in (1, 0))
    assert [list(one) for one in advantages] == [[3, 5, 8], [4, 6]]
    assert [x for one in advantages for x in one.values()] == pytest.approx([high, low, high, low, low])
    mask = torch.arange(9) >= 2
    row = rewards_to_go(advantages[0], mask)
    assert row.tolist() == pytest.approx([0, 0, *[2 * high + low] * 2, *[high + low] * 2, *[high] * 3], rel=1e-6)
    centred = process_advantages(steps, AdvantageSettings(normalize_by_std=False))
    assert [x for one in centred for x in one.values()] == pytest.approx([0.6, -0.4, 0.6, -0.4, -0.4])
    assert process_advantages([{3: 1.0}], AdvantageSettings()) == [{3: 0.0}]


def test_turns_are_bounded_by_the_mask_and_not_by_rewards() -> None:
    assert turns(MASK) == [(1, 3), (5, 7)]
    values = torch.linspace(0.1, 0.8, 8, dtype=torch.float64)
    settings = GaeSettings(gamma=1.0, lam=1.0, turn_gamma=1.0, turn_lam=1.0)
    early = torch.zeros(8, dtype=torch.float64)
    early[1] = 1.0  # inside a turn
    for estimate in (gae, turn_gae, bi_level_gae):
        without_reward, _ = estimate(torch.zeros_like(values), values, MASK, settings)
        advantages, returns = estimate(early, values, MASK, settings)
        assert (without_reward[MASK] != 0).all(), "turns without a reward have advantages"
        assert (advantages[~MASK] == 0).all()
        assert (returns[~MASK] == 0).all()
    together, _ = turn_gae(early, values, MASK, settings)
    assert together.tolist() == pytest.approx([0, 0.8, 0.8, 0, 0, -0.6, -0.6, 0])


def test_undiscounted_returns_are_sums_of_later_rewards() -> None:
    settings = GaeSettings(gamma=1.0, lam=1.0, turn_gamma=1.0, turn_lam=1.0)
    rewards = torch.tensor([0, 0.1, 0.2, 0, 0, 0.3, 0.4, 0], dtype=torch.float64)
    values = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, returns = gae(rewards, values, MASK, settings)
    assert returns.tolist() == pytest.approx([0, 1.0, 0.9, 0, 0, 0.7, 0.4, 0])


def test_value_loss_is_clipped_around_the_old_value() -> None:
    values = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    old, returns = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    clipped_loss = value_loss(values, old, returns, clip=0.2)
    assert clipped_loss.loss.tolist() == pytest.approx([0.5, 0.32, 0.32])
    assert clipped_loss.clipped.tolist() == [False, True, True]
    clipped_loss.loss.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [-1, 0, 0]
    unclipped_loss = value_loss(values, old, returns, clip=None)
    assert unclipped_loss.loss.tolist() == pytest.approx([0.5, 0.125, 0])
    assert not unclipped_loss.clipped.any()


def test_explained_variance_merges_over_ranks() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(100, generator=generator)
    predictions = targets + 0.5 * torch.randn(100, generator=generator) + 3  # a constant error does not change it
    expected = float(1 - (targets - predictions).var(correction=0) / targets.var(correction=0))
    parts = [explained_variance(predictions[part], targets[part]) for part in (slice(0, 30), slice(30, 100))]
    assert parts[0].merge(parts[1]).result() == pytest.approx(expected, rel=1e-5)
    assert ExplainedVariance(0, 0, 0, 0, 0).result() != ExplainedVariance(0, 0, 0, 0, 0).result()  # NaN


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(2.0, 0.1 * (1 + 0.2 * 0.1)), (1.1, 0.1 * (1 + 0.1 * 0.1)), (1.0, 0.1), (0.0, 0.1 * (1 - 0.2 * 0.1))],
)
def test_the_kl_coefficient_adapts_towards_the_target(kl: float, expected: float) -> None:
    assert adapted_coef(0.1, kl, target=1.0, num_responses=100, horizon=1000) == pytest.approx(expected)


def test_the_groups_with_the_highest_reward_std_are_kept() -> None:
    groups = [group(0, [0, 0]), group(1, [0, 1]), group(2, [0.4, 0.6]), group(3, [1, 1])]
    assert [one.index for one in top_std_groups(groups, 2)] == [1, 2]
    assert [one.index for one in top_std_groups(groups, 1)] == [1]
