"""Advantages, losses, aggregation and KL against published formulae, in float64 to 1e-6."""

import itertools
from collections.abc import Callable
from statistics import fmean, pstdev

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.advantages import (
    AdvantageFunction,
    AdvantageSettings,
    count_zero_variance_groups,
    grpo_advantages,
    kl_penalty_to_go,
    leave_one_out_advantages,
    pass_at_k_advantages,
    reward_advantages,
    whiten,
)
from megatron_rl.algorithms.kl import k1, k2, k3
from megatron_rl.algorithms.loss_weights import Aggregation, sequence_loss_weights
from megatron_rl.algorithms.losses import Clip, LossInputs, cispo_loss, gspo_loss, policy_gradient_loss, ppo_clip_loss
from megatron_rl.algorithms.objective import build_objective
from megatron_rl.config.algorithm import AlgorithmSection
from megatron_rl.errors import ConfigError

MEAN_ONLY = AdvantageSettings(normalize_by_std=False)
REWARDS = torch.tensor([1, 0, 0.1, 1], dtype=torch.float64)
GROUP = torch.zeros(4, dtype=torch.int64)
OLD = [[-0.5, -1, -0.2], [-0.7], [-0.3, -0.9], [-1.2, -0.1, -0.4, -0.6]]
NEW = [[-0.2, -1.1, -0.2], [-0.4], [-0.6, -0.9], [-1, -0.1, -0.9, -0.5]]
REF = [[-0.6, -1, -0.3], [-0.7], [-0.3, -1], [-1.2, -0.2, -0.4, -0.6]]
LENGTHS = torch.tensor([3, 1, 2, 4])


def flat(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([x for row in rows for x in row], dtype=torch.float64)


def mean_of_response(values: Tensor) -> Tensor:
    """Of the ten tokens of the four responses."""
    return torch.cat([row.mean().expand(row.numel()) for row in values.detach().split(LENGTHS.tolist())])


def given(logprobs: Tensor, old: Tensor | None = None, advantages: Tensor | None = None) -> LossInputs:
    """The four responses, with GRPO's advantages unless others are given."""
    own = grpo_advantages(REWARDS, GROUP, AdvantageSettings()).repeat_interleave(LENGTHS)
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=flat(OLD) if old is None else old,
        advantages=own if advantages is None else advantages,
        mean_of_response=mean_of_response,
    )


def loss_of(aggregation: Aggregation, *, std: bool = True, constant_length: int = 8, **algorithm: float | str) -> float:
    """sum(weight * token loss) / number of tokens, as the trainer forms it."""
    advantages = grpo_advantages(REWARDS, GROUP, AdvantageSettings(normalize_by_std=std)).repeat_interleave(LENGTHS)
    ones = torch.ones(10, dtype=torch.float64)
    objective = build_objective(AlgorithmSection(**algorithm))  # type: ignore[arg-type]
    terms = objective(given(flat(NEW), advantages=advantages), flat(REF), ones, 0 * ones)
    weights = sequence_loss_weights(LENGTHS, aggregation, constant_length=constant_length).repeat_interleave(LENGTHS)
    return float((weights * terms.total).sum() / LENGTHS.sum())


@pytest.mark.parametrize(
    ("std", "wanted"),
    [(True, [0.863479, -0.954372, -0.772587, 0.863479]), (False, [0.475, -0.525, -0.425, 0.475])],
)
def test_group_advantages(std: bool, wanted: list[float]) -> None:
    found = grpo_advantages(REWARDS, GROUP, AdvantageSettings(normalize_by_std=std))
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(("epsilon", "wanted"), [(1e-4, 0.865875), (1e-6, 0.866024), (1e-8, 0.866025)])
def test_std_epsilon_of_trl_verl_and_oat(epsilon: float, wanted: float) -> None:
    found = grpo_advantages(torch.tensor([1.0, 0, 0, 1]).double(), GROUP, AdvantageSettings(epsilon=epsilon))
    assert found.tolist() == pytest.approx([wanted, -wanted, -wanted, wanted], abs=1e-6)


def test_equal_rewards_give_no_advantage_and_are_counted() -> None:
    rewards = torch.tensor([1.0, 1, 1, 0, 1, 0.5])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    assert grpo_advantages(rewards, groups, AdvantageSettings())[:3].tolist() == [0, 0, 0]
    assert count_zero_variance_groups(rewards, groups) == 1


def test_failed_rewards_neither_count_nor_learn() -> None:
    rewards = torch.tensor([1.0, float("nan"), 0.0, float("nan"), 1.0, 5.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    for function in (grpo_advantages, leave_one_out_advantages, pass_at_k_advantages, reward_advantages):
        found = function(rewards, groups, MEAN_ONLY)
        assert [found[i] for i in (1, 3)] == [0, 0]
    assert grpo_advantages(rewards, groups, MEAN_ONLY).tolist() == [0.5, 0, -0.5, 0, 0, 0]
    assert leave_one_out_advantages(rewards, groups, MEAN_ONLY).tolist() == [1, 0, -1, 0, 0, 0]
    assert count_zero_variance_groups(rewards, groups) == 2


@pytest.mark.parametrize("function", [grpo_advantages, leave_one_out_advantages, pass_at_k_advantages])
def test_order_of_sequences_does_not_matter(function: AdvantageFunction) -> None:
    rewards, groups = torch.rand(12, dtype=torch.float64).round(decimals=1).round(), torch.arange(12) % 3
    order, settings = torch.randperm(12), AdvantageSettings(pass_k=2)
    shuffled, straight = function(rewards[order], groups[order], settings), function(rewards, groups, settings)
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
        (lambda: loss_of("token_mean", clip_ratio_high=0.28), -0.3467273),
        (lambda: loss_of("sequence_mean", loss="gspo", clip_ratio_low=3e-4, clip_ratio_high=4e-4), 0.0938577),
    ],
    ids=["grpo", "grpo-kl", "token-mean", "token-mean-kl", "constant-length-std", "dr-grpo", "dapo", "gspo"],
)
def test_losses(found, wanted: float) -> None:  # type: ignore[no-untyped-def]
    assert found() == pytest.approx(wanted, abs=1e-6)


def test_kl_estimators_and_clip_fraction() -> None:
    new, ref = flat(NEW), flat(REF)
    assert [float(k(new, ref).mean()) for k in (k1, k2, k3)] == pytest.approx([0.04, 0.034, 0.0352970], abs=1e-6)
    terms = build_objective(AlgorithmSection())(given(new), ref, torch.ones(10), torch.zeros(10))
    assert float(terms.clipped.double().mean()) == pytest.approx(0.3)


def test_ratios_of_responses() -> None:
    means = mean_of_response(flat(NEW) - flat(OLD)).exp()[[0, 3, 4, 6]]
    assert means.tolist() == pytest.approx([1.068939, 1.349859, 0.860708, 0.951229], abs=1e-6)


def gradient(loss: Tensor, logprobs: Tensor) -> list[float]:
    found: list[float] = torch.autograd.grad(loss, logprobs)[0].tolist()
    return found


@pytest.mark.parametrize("bounds", [(3e-4, 4e-4), (0.2, 0.2)])
def test_gspo_by_token_is_gspo_by_response(bounds: tuple[float, float]) -> None:
    """Equation 5 written out, value and gradient."""
    low, high = bounds
    logprobs = flat(NEW).requires_grad_()
    tokens = given(logprobs)
    weights = sequence_loss_weights(LENGTHS, "sequence_mean", constant_length=1).repeat_interleave(LENGTHS)
    found = (weights * gspo_loss(tokens, Clip(low=low, high=high)).loss).sum() / 10
    rows = (logprobs - flat(OLD)).split(LENGTHS.tolist())
    wanted = torch.zeros((), dtype=torch.float64)
    for row, advantage in zip(rows, grpo_advantages(REWARDS, GROUP, AdvantageSettings()), strict=True):
        ratio = row.mean().exp()
        wanted = wanted - torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage) / 4
    assert found.item() == pytest.approx(wanted.item(), abs=1e-12)
    assert gradient(found, logprobs) == pytest.approx(gradient(wanted, logprobs), abs=1e-12)


RATIOS = torch.tensor([0.5, 0.9, 1.1, 1.5, 4.0, 0.5, 0.9, 1.1, 1.5, 4.0], dtype=torch.float64)
SIGNS = torch.tensor([2.0] * 5 + [-2.0] * 5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "clip", "slopes", "is_clipped"),
    [
        # the gradient of -loss, as a factor of ratio x advantage or, where the ratio is no part of it, of the advantage
        (ppo_clip_loss, Clip(high=0.3), [1, 1, 1, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]),
        (ppo_clip_loss, Clip(dual=3.0), [1, 1, 1, 0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 0, 0, 0, 1]),
        (cispo_loss, Clip(high=0.3), [1, 1, 1, 1.3 / 1.5, 1.3 / 4] * 2, [0, 0, 0, 1, 1] * 2),
        (policy_gradient_loss, Clip(), [float(1 / r) for r in RATIOS], [0] * 10),
    ],
    ids=["clipped", "dual-clip", "cispo", "policy-gradient"],
)
def test_where_gradients_flow(
    loss: Callable[[LossInputs, Clip], object], clip: Clip, slopes: list[float], is_clipped: list[int]
) -> None:
    logprobs = RATIOS.log().sub(1).requires_grad_()
    found = loss(given(logprobs, torch.full_like(RATIOS, -1.0), SIGNS), clip)
    wanted = (-torch.tensor(slopes) * RATIOS * SIGNS).tolist()
    assert gradient(found.loss.sum(), logprobs) == pytest.approx(wanted)  # type: ignore[attr-defined]
    assert found.clipped.int().tolist() == is_clipped  # type: ignore[attr-defined]


def test_dual_clip_is_two_sided_clipping() -> None:
    """min(min(ratio, delta) A, clip(ratio) A), as TRL and INTELLECT-2 write it."""
    found = ppo_clip_loss(given(RATIOS.log(), torch.zeros_like(RATIOS), SIGNS), Clip(dual=3.0)).loss
    wanted = -torch.minimum(RATIOS.clamp(max=3.0) * SIGNS, RATIOS.clamp(0.8, 1.2) * SIGNS)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("rewards", [[1.0, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0], [1] * 5])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_advantages_equal_brute_force(rewards: list[float], k: int) -> None:
    subsets = list(itertools.combinations(range(5), k))
    best = {subset: max(rewards[i] for i in subset) for subset in subsets}
    mean, deviation = fmean(best.values()), pstdev(best.values())
    wanted = [
        (fmean(best[subset] for subset in subsets if i in subset) - mean) / deviation if deviation else 0.0
        for i in range(5)
    ]
    groups = torch.zeros(5, dtype=torch.int64)
    found = pass_at_k_advantages(torch.tensor(rewards).double(), groups, AdvantageSettings(pass_k=k))
    assert found.tolist() == pytest.approx(wanted, abs=1e-12)


def test_leave_one_out_is_each_against_its_siblings() -> None:
    found = leave_one_out_advantages(REWARDS, GROUP, AdvantageSettings())
    wanted = [reward - fmean(o for j, o in enumerate(REWARDS.tolist()) if j != i) for i, reward in enumerate(REWARDS)]
    assert found.tolist() == pytest.approx([float(x) for x in wanted])


def test_kl_in_the_reward_and_whitening() -> None:
    """Section F: the REINFORCE++ return of reward 1, and whitened GAE advantages."""
    differences = torch.tensor([0.0, 0.1, -0.05, 0.0, 0.2, 0.3], dtype=torch.float64)  # a prompt, and a padded end
    mask = torch.tensor([False, True, True, True, True, False])
    returns = 1 - kl_penalty_to_go(differences, torch.zeros_like(differences), mask, 0.1)
    assert returns.tolist() == pytest.approx([1, 0.975, 0.985, 0.98, 0.98, 1], abs=1e-12)
    values = torch.tensor([0.9, 0.8, 0.7, 0.6], dtype=torch.float64)
    found = whiten(values, float(values.mean()), float(values.var()))
    assert found.tolist() == pytest.approx([1.161895, 0.387298, -0.387298, -1.161895], abs=1e-6)


def test_unbiased_kl_has_the_gradient_of_the_kl_for_samples_of_the_old_policy() -> None:
    """Exactly, over a vocabulary of three: the expectation over old samples is the gradient of KL(new || ref)."""
    old, ref = (torch.tensor(x).double().log_softmax(0) for x in ([0.0, 1.0, -1.0], [0.5, -0.5, 0.0]))
    logits = torch.tensor([0.4, 0.2, -0.7], dtype=torch.float64, requires_grad=True)
    new = logits.log_softmax(0)
    wanted = (new.exp() * (new - ref)).sum()
    expected = gradient(wanted, logits)
    new = logits.log_softmax(0)
    objective = build_objective(AlgorithmSection(kl_coef=1.0, kl_unbiased=True))
    tokens = LossInputs(logprobs=new, old_logprobs=old, advantages=torch.zeros(3), mean_of_response=lambda x: x)
    found = (old.exp() * objective(tokens, ref, torch.ones(3), torch.zeros(3)).total).sum()
    assert found.item() == pytest.approx(wanted.item(), abs=1e-12)
    assert gradient(found, logits) == pytest.approx(expected, abs=1e-12)


def test_entropy_bonus_and_nll() -> None:
    objective = build_objective(AlgorithmSection(loss="nll", entropy_coef=0.5))
    logprobs, entropy = torch.tensor([-1.0, -2.0]), torch.tensor([0.4, 0.6])
    total = objective(given(logprobs, torch.ones(2), torch.ones(2)), torch.ones(2), torch.ones(2), entropy).total
    assert total.tolist() == pytest.approx([1 - 0.2, 2 - 0.3])


def test_rollout_weights_weigh_the_policy_loss_alone() -> None:
    """KL and entropy stay as they are, and no gradient goes through the weights."""
    old = torch.tensor([-1.0, -0.5, -2.0, -0.1], dtype=torch.float64)
    logprobs, factors = (old + 0.05).requires_grad_(), torch.tensor([1.0, 1.5, 0, 0.25]).double()
    advantages, entropy = torch.tensor([1.0, -1.0, 2.0, 0.5]).double(), torch.ones(4).double()
    tokens = given(logprobs, old, advantages)
    plain = build_objective(AlgorithmSection())(tokens, old, torch.ones(4), entropy).policy
    objective = build_objective(AlgorithmSection(kl_coef=0.1, entropy_coef=0.01))
    terms = objective(tokens, old, factors, entropy)
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
    with pytest.raises(ConfigError, match=r"algorithm.loss='ppo_clp'.*Did you mean ppo_clip"):
        build_objective(AlgorithmSection(loss="ppo_clp"))


def own_loss() -> None:
    """Stands for a user's loss."""
