"""Advantages, losses, aggregation and KL against published formulae, in float64 to 1e-6."""

import pytest
import torch

from megatron_rl.algorithms.advantages import count_zero_variance_groups, group_advantages
from megatron_rl.algorithms.kl import k1, k2, k3
from megatron_rl.algorithms.loss_weights import Aggregation, sequence_loss_weights
from megatron_rl.algorithms.objective import Objective, build_objective
from megatron_rl.config.schema import AlgorithmSection
from megatron_rl.errors import ConfigError

REWARDS = torch.tensor([1, 0, 0.1, 1], dtype=torch.float64)
GROUP = torch.zeros(4, dtype=torch.int64)
OLD = [[-0.5, -1, -0.2], [-0.7], [-0.3, -0.9], [-1.2, -0.1, -0.4, -0.6]]
NEW = [[-0.2, -1.1, -0.2], [-0.4], [-0.6, -0.9], [-1, -0.1, -0.9, -0.5]]
REF = [[-0.6, -1, -0.3], [-0.7], [-0.3, -1], [-1.2, -0.2, -0.4, -0.6]]
LENGTHS = torch.tensor([3, 1, 2, 4])


def flat(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([x for row in rows for x in row], dtype=torch.float64)


def loss_of(
    aggregation: Aggregation, *, std: bool = True, kl_coef: float = 0.0, high: float = 0.2, constant_length: int = 8
) -> float:
    """sum(weight * token loss) / number of tokens, as the trainer forms it."""
    advantages = group_advantages(REWARDS, GROUP, normalize_by_std=std, epsilon=1e-4)
    section = AlgorithmSection(kl_coef=kl_coef, kl_estimator="k3", clip_ratio_high=high)
    terms = build_objective(section)(
        flat(NEW),
        flat(OLD),
        flat(REF),
        torch.ones(10, dtype=torch.float64),
        advantages.repeat_interleave(LENGTHS),
        torch.zeros(10, dtype=torch.float64),
    )
    weights = sequence_loss_weights(LENGTHS, aggregation, constant_length=constant_length).repeat_interleave(LENGTHS)
    return float((weights * terms.total).sum() / LENGTHS.sum())


@pytest.mark.parametrize(
    ("std", "wanted"),
    [(True, [0.863479, -0.954372, -0.772587, 0.863479]), (False, [0.475, -0.525, -0.425, 0.475])],
)
def test_group_advantages(std: bool, wanted: list[float]) -> None:
    found = group_advantages(REWARDS, GROUP, normalize_by_std=std, epsilon=1e-4)
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(("epsilon", "wanted"), [(1e-4, 0.865875), (1e-6, 0.866024), (1e-8, 0.866025)])
def test_std_epsilon_of_trl_verl_and_oat(epsilon: float, wanted: float) -> None:
    found = group_advantages(torch.tensor([1.0, 0, 0, 1]).double(), GROUP, normalize_by_std=True, epsilon=epsilon)
    assert found.tolist() == pytest.approx([wanted, -wanted, -wanted, wanted], abs=1e-6)


def test_equal_rewards_give_no_advantage_and_are_counted() -> None:
    rewards = torch.tensor([1.0, 1, 1, 0, 1, 0.5])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    assert group_advantages(rewards, groups, normalize_by_std=True, epsilon=1e-4)[:3].tolist() == [0, 0, 0]
    assert count_zero_variance_groups(rewards, groups) == 1


def test_failed_rewards_neither_count_nor_learn() -> None:
    rewards = torch.tensor([1.0, float("nan"), 0.0, float("nan"), 1.0, 5.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    found = group_advantages(rewards, groups, normalize_by_std=False, epsilon=0.0)
    assert found.tolist() == [0.5, 0, -0.5, 0, 0, 0]
    assert count_zero_variance_groups(rewards, groups) == 2


def test_order_of_sequences_does_not_matter() -> None:
    rewards, groups = torch.rand(12, dtype=torch.float64), torch.arange(12) % 3
    order = torch.randperm(12)
    shuffled = group_advantages(rewards[order], groups[order], normalize_by_std=True, epsilon=1e-4)
    straight = group_advantages(rewards, groups, normalize_by_std=True, epsilon=1e-4)
    torch.testing.assert_close(shuffled, straight[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (lambda: loss_of("sequence_mean"), 0.0613807),
        (lambda: loss_of("sequence_mean", kl_coef=0.04), 0.0627729),
        (lambda: loss_of("token_mean"), -0.3379713),
        (lambda: loss_of("token_mean", kl_coef=0.04), -0.3365594),
        (lambda: loss_of("constant_length"), -0.1056160),
        (lambda: loss_of("constant_length", std=False), -0.0580994),
        (lambda: loss_of("token_mean", high=0.28), -0.3467273),
    ],
    ids=["grpo", "grpo-kl", "token-mean", "token-mean-kl", "constant-length-std", "dr-grpo", "dapo"],
)
def test_losses(found, wanted: float) -> None:  # type: ignore[no-untyped-def]
    assert found() == pytest.approx(wanted, abs=1e-6)


def test_kl_estimators_and_clip_fraction() -> None:
    new, ref = flat(NEW), flat(REF)
    assert [float(k(new, ref).mean()) for k in (k1, k2, k3)] == pytest.approx([0.04, 0.034, 0.0352970], abs=1e-6)
    advantages = group_advantages(REWARDS, GROUP, normalize_by_std=True, epsilon=1e-4).repeat_interleave(LENGTHS)
    terms = build_objective(AlgorithmSection())(new, flat(OLD), ref, torch.ones(10), advantages, torch.zeros(10))
    assert float(terms.clipped.double().mean()) == pytest.approx(0.3)


def test_entropy_bonus_and_nll() -> None:
    objective = Objective(
        loss=build_objective(AlgorithmSection(loss="nll")).loss,
        clip_ratio_low=0.2,
        clip_ratio_high=0.2,
        kl_coef=0.0,
        kl_estimator="k3",
        entropy_coef=0.5,
    )
    logprobs, entropy = torch.tensor([-1.0, -2.0]), torch.tensor([0.4, 0.6])
    total = objective(logprobs, *[torch.ones(2)] * 4, entropy).total
    assert total.tolist() == pytest.approx([1 - 0.2, 2 - 0.3])


def test_rollout_weights_weigh_the_policy_loss_alone() -> None:
    """KL and entropy stay as they are, and no gradient goes through the weights."""
    old = torch.tensor([-1.0, -0.5, -2.0, -0.1], dtype=torch.float64)
    logprobs, factors = (old + 0.05).requires_grad_(), torch.tensor([1.0, 1.5, 0, 0.25]).double()
    advantages, entropy = torch.tensor([1.0, -1.0, 2.0, 0.5]).double(), torch.ones(4).double()
    plain = build_objective(AlgorithmSection())(logprobs, old, old, torch.ones(4), advantages, entropy).policy
    objective = build_objective(AlgorithmSection(kl_coef=0.1, entropy_coef=0.01))
    terms = objective(logprobs, old, old, factors, advantages, entropy)
    torch.testing.assert_close(terms.total, factors * plain + 0.1 * k3(logprobs, old) - 0.01 * entropy)
    (found,) = torch.autograd.grad(terms.policy.sum(), logprobs, retain_graph=True)
    (before,) = torch.autograd.grad(plain.sum(), logprobs)
    torch.testing.assert_close(found, factors * before)


def test_sequences_without_loss_take_no_part() -> None:
    lengths = torch.tensor([4, 0, 2])
    for aggregation in ("token_mean", "sequence_mean", "constant_length"):
        weights = sequence_loss_weights(lengths, aggregation, constant_length=4)  # type: ignore[arg-type]
        assert weights[1] == 0
    assert sequence_loss_weights(lengths, "sequence_mean", constant_length=1).tolist() == pytest.approx([0.75, 0, 1.5])


def test_an_own_loss_is_loaded_by_name() -> None:
    section = AlgorithmSection(loss="tests.unit.test_algorithms:own_loss")
    assert build_objective(section).loss is own_loss
    with pytest.raises(ConfigError, match=r"algorithm.loss='cliped'.*Did you mean clipped"):
        build_objective(AlgorithmSection(loss="cliped"))


def own_loss() -> None:
    """Stands for a user's loss."""
