"""Importance weights and rejection of responses, against values computed by hand and for every split of a batch."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_rl.algorithms.importance import RolloutCorrection, build_correction, geometric_ratio, sequence_ratio
from megatron_rl.algorithms.objective import build_objective
from megatron_rl.batching.align import align
from megatron_rl.batching.batch import given_batch
from megatron_rl.batching.context_parallel import context_share
from megatron_rl.batching.sequences import bare_sequence
from megatron_rl.config.algorithm import AlgorithmSection
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.errors import TrainingDiverged
from megatron_rl.mcore.policy_loss import PolicyLoss
from megatron_rl.metrics.metric import Reduction, merge, results
from megatron_rl.trainer.rollout_correction import check_logprob_mismatch, correct_rollout
from megatron_rl.types import ParallelContext, TrainBatch

# log(trainer / engine probability) of the tokens of four responses; the last has no tokens
LOG_RATIOS = [[0.1, -0.3, 0.4], [-0.5, -0.7], [1.2], []]
PROMPT = 2
ENGINE = -1.5


def section(**fields: Any) -> AlgorithmSection:
    return AlgorithmSection(**fields)


def batch_of(log_ratios: Sequence[Sequence[float]]) -> TrainBatch:
    """Return a batch of responses; the log-probabilities of their prompts must have no effect."""
    sequences = []
    for row in log_ratios:
        length = PROMPT + len(row)
        bare = bare_sequence(torch.arange(length), torch.arange(length) >= PROMPT)
        old, rollout = torch.full((length,), ENGINE), torch.full((length,), ENGINE)
        old[PROMPT:] += torch.tensor(row)
        old[:PROMPT] = 7.0
        sequences.append(replace(bare, old_logprobs=old, rollout_logprobs=rollout))
    return given_batch(sequences, [range(len(sequences))])


def corrected(correction: RolloutCorrection, log_ratios: Sequence[Sequence[float]] = LOG_RATIOS) -> Any:
    """Return each response's weight in the policy loss, its weight in the total loss, and the metrics."""
    batch, metrics = correct_rollout(batch_of(log_ratios), correction)
    pairs = []
    for sequence in batch.sequences:
        weights = set(sequence.rollout_weights.tolist())
        whole = set(sequence.loss_weights[sequence.loss_mask].tolist())
        assert len(weights) == 1
        assert len(whole) <= 1  # the same for all tokens of a response
        pairs.append((weights.pop(), whole.pop() if whole else 1.0))
    return [w for w, _ in pairs], [w for _, w in pairs], {name: one.result() for name, one in metrics.items()}


def test_ratios_of_a_response_are_the_product_and_geometric_mean_of_its_tokens() -> None:
    """The log-ratios of the three tokens sum to 0.1 - 0.3 + 0.4 = 0.2."""
    old, rollout = torch.tensor([-1.0, -0.8, -0.1]), torch.tensor([-1.1, -0.5, -0.5])
    assert float(sequence_ratio(old, rollout)) == pytest.approx(math.exp(0.2), abs=1e-6)
    assert float(geometric_ratio(old, rollout)) == pytest.approx(math.exp(0.2 / 3), abs=1e-6)
    nothing = torch.zeros(0)
    assert float(sequence_ratio(nothing, nothing)) == float(geometric_ratio(nothing, nothing)) == 1


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # ratios of 1, 1.5, 0.25 and 4 with bounds 0.5 and 2
        ("token_truncate", [1, 1.5, 0.25, 2]),
        ("token_mask", [1, 1.5, 0, 0]),
    ],
)
def test_token_weights_are_truncated_or_masked(kind: str, expected: list[float]) -> None:
    correction = build_correction(section(rollout_is=kind))
    assert not correction.needs_whole_responses
    rollout = torch.tensor([-1.0, -0.5, -2.0, -0.1], dtype=torch.float64)
    ratios = [1.0, 1.5, 0.25, 4.0]
    old = rollout + torch.tensor([math.log(ratio) for ratio in ratios], dtype=torch.float64)
    assert correction.token_weights(old, rollout).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "expected", "changed"),
    [
        # e^0.2 = 1.2214, e^-1.2 = 0.3012, e^1.2 = 3.3201
        ("sequence_truncate", [math.exp(0.2), math.exp(-1.2), 2.0, 1.0], 1 / 3),
        ("sequence_mask", [math.exp(0.2), 0.0, 0.0, 1.0], 2 / 3),
    ],
)
def test_sequence_weights_are_truncated_or_masked(kind: str, expected: list[float], changed: float) -> None:
    weights, whole, metrics = corrected(build_correction(section(rollout_is=kind)))
    assert weights == pytest.approx(expected, abs=1e-6)
    assert whole == [1, 1, 1, 1]
    assert metrics == pytest.approx(
        {
            "rollout_corr/rejected": 0,
            "rollout_corr/is_weight": sum(expected[:3]) / 3,
            "rollout_corr/is_changed": changed,
        },
        abs=1e-6,
    )


@pytest.mark.parametrize(
    ("fields", "kept", "vetoed"),
    [
        # ratios of responses 1.22, 0.30, 3.32; geometric means over tokens e^0.0667 = 1.069, e^-0.6 = 0.549, 3.32
        ({"rollout_rejection": "sequence", "bounds": (0.5, 2.0)}, [1, 0, 0, 1], None),
        ({"rollout_rejection": "sequence", "bounds": (0.3, 1.2)}, [0, 1, 0, 1], None),
        ({"rollout_rejection": "geometric", "bounds": (0.5, 2.0)}, [1, 1, 0, 1], None),
        ({"rollout_rejection": "geometric", "bounds": (0.99, 1.06)}, [0, 0, 0, 1], None),
        # the smallest ratios of tokens are e^-0.7 = 0.497, e^-0.5 = 0.607 and e^-0.3 = 0.741
        ({"rollout_veto": 0.5}, [1, 0, 1, 1], 1 / 3),
        ({"rollout_veto": 0.75}, [0, 0, 1, 1], 2 / 3),
        ({"rollout_veto": 0.5, "rollout_rejection": "geometric", "bounds": (0.5, 2.0)}, [1, 0, 0, 1], 1 / 3),
    ],
)
def test_responses_outside_the_bounds_are_rejected(
    fields: dict[str, Any], kept: list[int], vetoed: float | None
) -> None:
    low, high = fields.pop("bounds", (None, None))
    config = section(rollout_rejection_low=low, rollout_rejection_high=high, **fields)
    weights, whole, metrics = corrected(build_correction(config))
    assert weights == [1, 1, 1, 1]
    assert whole == kept
    assert metrics["rollout_corr/rejected"] == pytest.approx(1 - sum(kept[:3]) / 3)
    assert metrics.get("rollout_corr/vetoed") == pytest.approx(vetoed)


@pytest.mark.parametrize("seed", range(3))
def test_bounds_hold_for_any_ratios(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [(torch.randn(length, generator=generator) * 2).tolist() for length in torch.arange(1, 400, 7).tolist()]
    truncated, _, _ = corrected(build_correction(section(rollout_is="sequence_truncate", rollout_is_high=3.0)), rows)
    masked, _, _ = corrected(build_correction(section(rollout_is="sequence_mask", rollout_is_high=3.0)), rows)
    assert max(truncated) == 3.0
    assert min(truncated) >= 0
    for row, one, other in zip(rows, truncated, masked, strict=True):
        ratio = math.exp(math.fsum(row))  # up to e^500; intermediate values must not overflow
        assert one == pytest.approx(min(ratio, 3.0), rel=1e-4)
        assert other == (pytest.approx(ratio, rel=1e-4) if 0.5 <= ratio <= 3.0 else 0)


CORRECTIONS = [
    {"rollout_is": "sequence_truncate"},
    {"rollout_is": "sequence_mask"},
    {"rollout_rejection": "sequence", "rollout_rejection_low": 1.0, "rollout_rejection_high": 1.0},
    {"rollout_rejection": "geometric", "rollout_rejection_low": 1.0, "rollout_rejection_high": 1.0},
    {"rollout_veto": 0.999},
]


@pytest.mark.parametrize("fields", CORRECTIONS, ids=str)
def test_equal_logprobs_change_nothing(fields: dict[str, Any]) -> None:
    batch = batch_of([[0.0] * len(row) for row in LOG_RATIOS])
    corrected_batch, metrics = correct_rollout(batch, build_correction(section(**fields)))
    assert metrics["rollout_corr/rejected"].result() == 0
    for one, original in zip(corrected_batch.sequences, batch.sequences, strict=True):
        assert torch.equal(one.loss_weights, original.loss_weights)
        assert torch.equal(one.rollout_weights, torch.ones(original.token_ids.numel()))


def test_a_batch_is_returned_unchanged_if_no_whole_responses_are_needed() -> None:
    for fields in ({}, {"rollout_is": "token_mask"}):
        batch = batch_of(LOG_RATIOS)
        corrected_batch, metrics = correct_rollout(batch, build_correction(section(**fields)))
        assert corrected_batch is batch
        assert metrics == {}


@pytest.mark.parametrize("rejection", ["sequence", "geometric"])
def test_responses_with_nan_or_infinite_logprobs_are_rejected(rejection: str) -> None:
    config = section(rollout_rejection=rejection, rollout_rejection_low=0.0, rollout_rejection_high=1e30)
    _, whole, _ = corrected(build_correction(config), [[0.1, math.nan], [0.1, math.inf], [0.1]])
    assert whole == [0, 0, 1]


ALL_CORRECTIONS = section(
    rollout_is="sequence_truncate",
    rollout_is_high=1.5,
    rollout_rejection="geometric",
    rollout_rejection_low=0.6,
    rollout_rejection_high=2.0,
    rollout_veto=0.25,
)
# kept with weight e^0.2; rejected by its mean; truncated to 1.5; rejected by one token; kept with a weight below 1
SPLIT = [[0.1, -0.3, 0.4], [-0.5, -0.7], [0.6], [0.2, 0.4, -1.4, 0.6, 0.1, 0.2], [-0.1, 0.0, -0.2, -0.3, 0.1]]
WEIGHTS = [math.exp(0.2), 0.0, 1.5, 0.0, math.exp(-0.5)]
ADVANTAGES = [1.0, -2.0, 0.5, 3.0, -1.0]
SHARES = [0.5, 1.0, 2.0, 1.0, 0.7]


def logprob_change(index: int, token: int) -> float:
    """Return the current minus the old log-probability of a token of a response; some ratios are clipped."""
    return 0.3 * math.sin(3.0 * index + token)


def expected_loss_and_gradient() -> tuple[float, list[list[float]]]:
    """Return the loss and its gradient for each token, averaged over all 17 tokens, rejected responses included."""
    total, gradient = 0.0, []
    for index, row in enumerate(SPLIT):
        gradient.append([])
        for token in range(len(row)):
            ratio, advantage = math.exp(logprob_change(index, token)), ADVANTAGES[index]
            factor = WEIGHTS[index] * SHARES[index] / 17
            unclipped, clipped = ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage
            total -= factor * min(unclipped, clipped)
            gradient[-1].append(-factor * unclipped if unclipped <= clipped else 0.0)
    return total, gradient


@pytest.mark.parametrize("cp_size", [1, 2])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("split", [[[0, 1, 2, 3, 4]], [[4, 1], [3, 0, 2]], [[0], [1], [2], [3], [4]]], ids=str)
def test_loss_and_gradient_are_the_same_for_every_split(split: list[list[int]], packed: bool, cp_size: int) -> None:
    correction = build_correction(ALL_CORRECTIONS)
    batch, _ = correct_rollout(batch_of(SPLIT), correction)
    rows, sequences = [], []
    for index, sequence in enumerate(batch.sequences):
        current = sequence.old_logprobs.clone()
        current[PROMPT:] += torch.tensor([logprob_change(index, token) for token in range(len(SPLIT[index]))])
        rows.append(current.requires_grad_())
        ones = torch.ones(current.numel())
        sequences.append(
            replace(
                sequence,
                advantages=ones * ADVANTAGES[index],
                loss_weights=sequence.loss_weights * SHARES[index],
                ref_logprobs=rows[-1],  # carries the current log-probabilities through `align`
            )
        )
    loss_of = PolicyLoss(build_objective(section()), correction, has_rollout_logprobs=True, has_old_logprobs=True)
    total, count = torch.zeros(()), 0
    for indices in split:
        multiple = 2 * cp_size if cp_size > 1 else 1
        whole = align(
            [sequences[i] for i in indices], packed=packed, multiple_of=multiple, sequence_multiple_of=multiple
        )
        for rank in range(cp_size):
            share = context_share(whole, rank, cp_size)
            logprobs = share.ref_logprobs[share.loss_mask]
            loss, number, _ = loss_of(share, logprobs, torch.zeros_like(logprobs))
            total, count = total + loss, count + int(number)
    assert count == 17
    expected, gradient = expected_loss_and_gradient()
    assert float(total.detach() / count) == pytest.approx(expected, abs=1e-6)
    for actual, row in zip(torch.autograd.grad(total / count, rows), gradient, strict=True):
        assert actual.tolist() == pytest.approx([0.0] * PROMPT + row, abs=1e-6)


def metrics_of(split: list[list[int]], rows: Sequence[Sequence[float]]) -> dict[str, Reduction]:
    """Return the metrics of the first update of a batch, split into micro-batches."""
    sequences = batch_of(rows).sequences
    loss_of = PolicyLoss(
        build_objective(section()), build_correction(section()), has_rollout_logprobs=True, has_old_logprobs=True
    )
    parts = []
    for indices in split:
        batch = align([sequences[i] for i in indices], packed=True)
        logprobs = batch.old_logprobs[batch.loss_mask]
        parts.append(loss_of(batch, logprobs, torch.zeros_like(logprobs))[2])
    return merge(parts)


@pytest.mark.parametrize("split", [[[0, 1, 2, 3]], [[3, 1], [2, 0]], [[0], [1], [2], [3]]], ids=str)
def test_mismatch_metrics_equal_values_by_hand(split: list[list[int]]) -> None:
    flat = list(itertools.chain(*LOG_RATIOS))
    ratios = [math.exp(x) for x in flat]
    values = results(metrics_of(split, LOG_RATIOS))
    expected = {
        "train_rollout_logprob_abs_diff/mean": sum(map(abs, flat)) / 6,
        "train_rollout_logprob_abs_diff/max": 1.2,
        "rollout_corr/k3_kl": sum(math.exp(x) - 1 - x for x in flat) / 6,
        "rollout_corr/chi2_token": sum(r * r for r in ratios) / 6 - 1,
        "rollout_corr/ess": sum(ratios) ** 2 / (6 * sum(r * r for r in ratios)),
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_a_warning_names_the_worst_tokens() -> None:
    """The id of a token is its position in its sequence, whose first two tokens are the prompt."""
    metrics = metrics_of([[0, 1], [2, 3]], LOG_RATIOS)
    alone, notes = cast(ParallelContext, SimpleNamespace(world_size=1, host_group=None)), []
    check_logprob_mismatch(metrics, RolloutSection(), alone, notes.append)
    (note,) = notes
    assert note.endswith(
        "Largest differences: token 2 at position 2: trainer -0.300, engine -1.500; "
        "token 3 at position 3: trainer -2.200, engine -1.500; "
        "token 2 at position 2: trainer -2.000, engine -1.500."
    )
    with pytest.raises(TrainingDiverged, match=r"Largest differences: token 2 at position 2: trainer -0\.300"):
        check_logprob_mismatch(metrics, RolloutSection(drift_limit=0.2), alone, notes.append)
    check_logprob_mismatch(metrics, RolloutSection(drift_warning=None), alone, notes.append)
    check_logprob_mismatch({}, RolloutSection(), alone, notes.append)
    assert len(notes) == 1
