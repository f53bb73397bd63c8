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
    """Return the mean of `values` over each of the four responses, repeated for its tokens; shape [10]."""
    return torch.cat([row.mean().expand(row.numel()) for row in values.detach().split(LENGTHS.tolist())])


def loss_inputs(logprobs: Tensor, old: Tensor | None = None, advantages: Tensor | None = None) -> LossInputs:
    """Return the four responses as inputs of a loss, with GRPO advantages unless `advantages` is set."""
    grpo = grpo_advantages(REWARDS, GROUP, AdvantageSettings()).repeat_interleave(LENGTHS)
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=flat(OLD) if old is None else old,
        advantages=grpo if advantages is None else advantages,
        mean_of_response=mean_of_response,
    )


def loss_of(aggregation: Aggregation, *, std: bool = True, constant_length: int = 8, **algorithm: float | str) -> float:
    """Return sum(weight * token loss) / number of tokens, as the trainer computes it."""
    advantages = grpo_advantages(REWARDS, GROUP, AdvantageSettings(normalize_by_std=std)).repeat_interleave(LENGTHS)
    ones = torch.ones(10, dtype=torch.float64)
    objective = build_objective(AlgorithmSection(**algorithm))  # type: ignore[arg-type]
    terms = objective(loss_inputs(flat(NEW), advantages=advantages), flat(REF), ones, 0 * ones)
    weights = sequence_loss_weights(LENGTHS, aggregation, constant_length=constant_length).repeat_interleave(LENGTHS)
    return float((weights * terms.total).sum() / LENGTHS.sum())


@pytest.mark.parametrize(
    ("std", "expected"),
    [(True, [0.863479, -0.954372, -0.772587, 0.863479]), (False, [0.475, -0.525, -0.425, 0.475])],
)
def test_grpo_advantages_equal_published_values(std: bool, expected: list[float]) -> None:
    actual = grpo_advantages(REWARDS, GROUP, AdvantageSettings(normalize_by_std=std))
    assert actual.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("epsilon", "expected"), [(1e-4, 0.865875), (1e-6, 0.866024), (1e-8, 0.866025)])
def test_std_epsilons_give_the_advantages_of_trl_verl_and_oat(epsilon: float, expected: float) -> None:
    actual = grpo_advantages(torch.tensor([1.0, 0, 0, 1]).double(), GROUP, AdvantageSettings(epsilon=epsilon))
    assert actual.tolist() == pytest.approx([expected, -expected, -expected, expected], abs=1e-6)


def test_groups_of_equal_rewards_have_zero_advantage_and_are_counted() -> None:
    rewards = torch.tensor([1.0, 1, 1, 0, 1, 0.5])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    assert grpo_advantages(rewards, groups, AdvantageSettings())[:3].tolist() == [0, 0, 0]
    assert count_zero_variance_groups(rewards, groups) == 1


def test_failed_rewards_are_left_out_and_get_zero_advantage() -> None:
    rewards = torch.tensor([1.0, float("nan"), 0.0, float("nan"), 1.0, 5.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    for function in (grpo_advantages, leave_one_out_advantages, pass_at_k_advantages, reward_advantages):
        actual = function(rewards, groups, MEAN_ONLY)
        assert [actual[i] for i in (1, 3)] == [0, 0]
    assert grpo_advantages(rewards, groups, MEAN_ONLY).tolist() == [0.5, 0, -0.5, 0, 0, 0]
    assert leave_one_out_advantages(rewards, groups, MEAN_ONLY).tolist() == [1, 0, -1, 0, 0, 0]
    assert count_zero_variance_groups(rewards, groups) == 2


@pytest.mark.parametrize("function", [grpo_advantages, leave_one_out_advantages, pass_at_k_advantages])
def test_advantages_do_not_depend_on_the_order_of_sequences(function: AdvantageFunction) -> None:
    rewards, groups = torch.rand(12, dtype=torch.float64).round(decimals=1).round(), torch.arange(12) % 3
    order, settings = torch.randperm(12), AdvantageSettings(pass_k=2)
    shuffled, unshuffled = function(rewards[order], groups[order], settings), function(rewards, groups, settings)
    torch.testing.assert_close(shuffled, unshuffled[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("actual", "expected"),
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
def test_losses_equal_published_values(actual, expected: float) -> None:  # type: ignore[no-untyped-def]
    assert actual() == pytest.approx(expected, abs=1e-6)


def test_kl_estimators_and_clip_fraction_have_the_expected_values() -> None:
    new, ref = flat(NEW), flat(REF)
    assert [float(k(new, ref).mean()) for k in (k1, k2, k3)] == pytest.approx([0.04, 0.034, 0.0352970], abs=1e-6)
    terms = build_objective(AlgorithmSection())(loss_inputs(new), ref, torch.ones(10), torch.zeros(10))
    assert float(terms.clipped.double().mean()) == pytest.approx(0.3)


def test_mean_log_ratios_of_responses_have_the_expected_values() -> None:
    means = mean_of_response(flat(NEW) - flat(OLD)).exp()[[0, 3, 4, 6]]
    assert means.tolist() == pytest.approx([1.068939, 1.349859, 0.860708, 0.951229], abs=1e-6)


def gradient(loss: Tensor, logprobs: Tensor) -> list[float]:
    gradients: list[float] = torch.autograd.grad(loss, logprobs)[0].tolist()
    return gradients


@pytest.mark.parametrize("bounds", [(3e-4, 4e-4), (0.2, 0.2)])
def test_token_level_gspo_equals_sequence_level_gspo(bounds: tuple[float, float]) -> None:
    """Compare value and gradient with equation 5 of GSPO, written out."""
    low, high = bounds
    logprobs = flat(NEW).requires_grad_()
    inputs = loss_inputs(logprobs)
    weights = sequence_loss_weights(LENGTHS, "sequence_mean", constant_length=1).repeat_interleave(LENGTHS)
    actual = (weights * gspo_loss(inputs, Clip(low=low, high=high)).loss).sum() / 10
    rows = (logprobs - flat(OLD)).split(LENGTHS.tolist())
    expected = torch.zeros((), dtype=torch.float64)
    for row, advantage in zip(rows, grpo_advantages(REWARDS, GROUP, AdvantageSettings()), strict=True):
        ratio = row.mean().exp()
        expected = expected - torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage) / 4
    assert actual.item() == pytest.approx(expected.item(), abs=1e-12)
    assert gradient(actual, logprobs) == pytest.approx(gradient(expected, logprobs), abs=1e-12)


RATIOS = torch.tensor([0.5, 0.9, 1.1, 1.5, 4.0, 0.5, 0.9, 1.1, 1.5, 4.0], dtype=torch.float64)
SIGNS = torch.tensor([2.0] * 5 + [-2.0] * 5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "clip", "slopes", "is_clipped"),
    [
        # slopes: the gradient of -loss with respect to the log-probability, divided by (ratio x advantage)
        (ppo_clip_loss, Clip(high=0.3), [1, 1, 1, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]),
        (ppo_clip_loss, Clip(dual=3.0), [1, 1, 1, 0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 0, 0, 0, 1]),
        (cispo_loss, Clip(high=0.3), [1, 1, 1, 1.3 / 1.5, 1.3 / 4] * 2, [0, 0, 0, 1, 1] * 2),
        (policy_gradient_loss, Clip(), [float(1 / r) for r in RATIOS], [0] * 10),
    ],
    ids=["clipped", "dual-clip", "cispo", "policy-gradient"],
)
def test_each_loss_has_its_gradient_and_clipped_tokens(
    loss: Callable[[LossInputs, Clip], object], clip: Clip, slopes: list[float], is_clipped: list[int]
) -> None:
    logprobs = RATIOS.log().sub(1).requires_grad_()
    terms = loss(loss_inputs(logprobs, torch.full_like(RATIOS, -1.0), SIGNS), clip)
    expected = (-torch.tensor(slopes) * RATIOS * SIGNS).tolist()
    assert gradient(terms.loss.sum(), logprobs) == pytest.approx(expected)  # type: ignore[attr-defined]
    assert terms.clipped.int().tolist() == is_clipped  # type: ignore[attr-defined]


def test_dual_clip_equals_two_sided_clipping() -> None:
    """The loss is -min(min(ratio, delta) A, clip(ratio) A), as in TRL and INTELLECT-2."""
    actual = ppo_clip_loss(loss_inputs(RATIOS.log(), torch.zeros_like(RATIOS), SIGNS), Clip(dual=3.0)).loss
    expected = -torch.minimum(RATIOS.clamp(max=3.0) * SIGNS, RATIOS.clamp(0.8, 1.2) * SIGNS)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("rewards", [[1.0, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0], [1] * 5])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_advantages_equal_brute_force(rewards: list[float], k: int) -> None:
    subsets = list(itertools.combinations(range(5), k))
    best = {subset: max(rewards[i] for i in subset) for subset in subsets}
    mean, deviation = fmean(best.values()), pstdev(best.values())
    expected = [
        (fmean(best[subset] for subset in subsets if i in subset) - mean) / deviation if deviation else 0.0
        for i in range(5)
    ]
    groups = torch.zeros(5, dtype=torch.int64)
    actual = pass_at_k_advantages(torch.tensor(rewards).double(), groups, AdvantageSettings(pass_k=k))
    assert actual.tolist() == pytest.approx(expected, abs=1e-12)


def test_leave_one_out_subtracts_the_mean_of_the_siblings() -> None:
    actual = leave_one_out_advantages(REWARDS, GROUP, AdvantageSettings())
    expected = [reward - fmean(o for j, o in enumerate(REWARDS.tolist()) if j != i) for i, reward in enumerate(REWARDS)]
    assert actual.tolist() == pytest.approx([float(x) for x in expected])


def test_kl_penalty_to_go_and_whitening_have_the_expected_values() -> None:
    """Check the REINFORCE++ return of reward 1, and whitened GAE advantages, against worked examples."""
    differences = torch.tensor([0.0, 0.1, -0.05, 0.0, 0.2, 0.3], dtype=torch.float64)  # first: prompt; last: padding
    mask = torch.tensor([False, True, True, True, True, False])
    returns = 1 - kl_penalty_to_go(differences, torch.zeros_like(differences), mask, 0.1)
    assert returns.tolist() == pytest.approx([1, 0.975, 0.985, 0.98, 0.98, 1], abs=1e-12)
    values = torch.tensor([0.9, 0.8, 0.7, 0.6], dtype=torch.float64)
    actual = whiten(values, float(values.mean()), float(values.var()))
    assert actual.tolist() == pytest.approx([1.161895, 0.387298, -0.387298, -1.161895], abs=1e-6)


def test_unbiased_kl_has_the_exact_gradient_for_samples_of_the_old_policy() -> None:
    """With a vocabulary of three, the expectation over samples of the old policy is the gradient of KL(new || ref)."""
    old, ref = (torch.tensor(x).double().log_softmax(0) for x in ([0.0, 1.0, -1.0], [0.5, -0.5, 0.0]))
    logits = torch.tensor([0.4, 0.2, -0.7], dtype=torch.float64, requires_grad=True)
    new = logits.log_softmax(0)
    exact_kl = (new.exp() * (new - ref)).sum()
    expected_gradient = gradient(exact_kl, logits)
    new = logits.log_softmax(0)
    objective = build_objective(AlgorithmSection(kl_coef=1.0, kl_unbiased=True))
    tokens = LossInputs(logprobs=new, old_logprobs=old, advantages=torch.zeros(3), mean_of_response=lambda x: x)
    loss = (old.exp() * objective(tokens, ref, torch.ones(3), torch.zeros(3)).total).sum()
    assert loss.item() == pytest.approx(exact_kl.item(), abs=1e-12)
    assert gradient(loss, logits) == pytest.approx(expected_gradient, abs=1e-12)


def test_nll_subtracts_the_entropy_bonus() -> None:
    objective = build_objective(AlgorithmSection(loss="nll", entropy_coef=0.5))
    logprobs, entropy = torch.tensor([-1.0, -2.0]), torch.tensor([0.4, 0.6])
    total = objective(loss_inputs(logprobs, torch.ones(2), torch.ones(2)), torch.ones(2), torch.ones(2), entropy).total
    assert total.tolist() == pytest.approx([1 - 0.2, 2 - 0.3])


def test_rollout_weights_scale_only_the_policy_loss() -> None:
    """KL and entropy terms are unchanged, and no gradient flows through the weights."""
    old = torch.tensor([-1.0, -0.5, -2.0, -0.1], dtype=torch.float64)
    logprobs, factors = (old + 0.05).requires_grad_(), torch.tensor([1.0, 1.5, 0, 0.25]).double()
    advantages, entropy = torch.tensor([1.0, -1.0, 2.0, 0.5]).double(), torch.ones(4).double()
    tokens = loss_inputs(logprobs, old, advantages)
    plain = build_objective(AlgorithmSection())(tokens, old, torch.ones(4), entropy).policy
    objective = build_objective(AlgorithmSection(kl_coef=0.1, entropy_coef=0.01))
    terms = objective(tokens, old, factors, entropy)
    torch.testing.assert_close(terms.total, factors * plain + 0.1 * k3(logprobs, old) - 0.01 * entropy)
    (weighted,) = torch.autograd.grad(terms.policy.sum(), logprobs, retain_graph=True)
    (unweighted,) = torch.autograd.grad(plain.sum(), logprobs)
    torch.testing.assert_close(weighted, factors * unweighted)


def test_sequences_without_loss_have_weight_zero() -> None:
    lengths = torch.tensor([4, 0, 2])
    for aggregation in ("token_mean", "sequence_mean", "constant_length"):
        weights = sequence_loss_weights(lengths, aggregation, constant_length=4)  # type: ignore[arg-type]
        assert weights[1] == 0
    assert sequence_loss_weights(lengths, "sequence_mean", constant_length=1).tolist() == pytest.approx([0.75, 0, 1.5])


def test_a_custom_loss_is_loaded_by_name() -> None:
    section = AlgorithmSection(loss="tests.unit.test_algorithms:custom_loss")
    assert build_objective(section).loss is custom_loss
    with pytest.raises(ConfigError, match=r"algorithm.loss='ppo_clp'.*Did you mean ppo_clip"):
        build_objective(AlgorithmSection(loss="ppo_clp"))


def custom_loss() -> None:
    """Stand in for a user's loss function."""
