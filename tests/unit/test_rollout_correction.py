"""Importance weights and rejection of responses: against values by hand, and the same for every split."""

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

# log(trainer / engine) of the tokens of four responses; the last has none
LOG_RATIOS = [[0.1, -0.3, 0.4], [-0.5, -0.7], [1.2], []]
PROMPT = 2
ENGINE = -1.5


def section(**fields: Any) -> AlgorithmSection:
    return AlgorithmSection(**fields)


def batch_of(log_ratios: Sequence[Sequence[float]]) -> TrainBatch:
    """Responses after prompts whose own values must not matter."""
    found = []
    for row in log_ratios:
        length = PROMPT + len(row)
        bare = bare_sequence(torch.arange(length), torch.arange(length) >= PROMPT)
        old, rollout = torch.full((length,), ENGINE), torch.full((length,), ENGINE)
        old[PROMPT:] += torch.tensor(row)
        old[:PROMPT] = 7.0
        found.append(replace(bare, old_logprobs=old, rollout_logprobs=rollout))
    return given_batch(found, [range(len(found))])


def corrected(correction: RolloutCorrection, log_ratios: Sequence[Sequence[float]] = LOG_RATIOS) -> Any:
    """Of every response its one weight of the policy loss and its one weight of the whole loss; and the metrics."""
    batch, metrics = correct_rollout(batch_of(log_ratios), correction)
    pairs = []
    for sequence in batch.sequences:
        weights = set(sequence.rollout_weights.tolist())
        whole = set(sequence.loss_weights[sequence.loss_mask].tolist())
        assert len(weights) == 1
        assert len(whole) <= 1  # all tokens of a response alike
        pairs.append((weights.pop(), whole.pop() if whole else 1.0))
    return [w for w, _ in pairs], [w for _, w in pairs], {name: one.result() for name, one in metrics.items()}


def test_ratios_of_a_response() -> None:
    """0.1 - 0.3 + 0.4 = 0.2, over three tokens."""
    old, rollout = torch.tensor([-1.0, -0.8, -0.1]), torch.tensor([-1.1, -0.5, -0.5])
    assert float(sequence_ratio(old, rollout)) == pytest.approx(math.exp(0.2), abs=1e-6)
    assert float(geometric_ratio(old, rollout)) == pytest.approx(math.exp(0.2 / 3), abs=1e-6)
    nothing = torch.zeros(0)
    assert float(sequence_ratio(nothing, nothing)) == float(geometric_ratio(nothing, nothing)) == 1


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        # ratios of 1, 1.5, 0.25 and 4 with bounds 0.5 and 2
        ("token_truncate", [1, 1.5, 0.25, 2]),
        ("token_mask", [1, 1.5, 0, 0]),
    ],
)
def test_weights_of_tokens(kind: str, wanted: list[float]) -> None:
    correction = build_correction(section(rollout_is=kind))
    assert not correction.needs_whole_responses
    rollout = torch.tensor([-1.0, -0.5, -2.0, -0.1], dtype=torch.float64)
    ratios = [1.0, 1.5, 0.25, 4.0]
    old = rollout + torch.tensor([math.log(ratio) for ratio in ratios], dtype=torch.float64)
    assert correction.token_weights(old, rollout).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("kind", "wanted", "changed"),
    [
        # e^0.2 = 1.2214, e^-1.2 = 0.3012, e^1.2 = 3.3201
        ("sequence_truncate", [math.exp(0.2), math.exp(-1.2), 2.0, 1.0], 1 / 3),
        ("sequence_mask", [math.exp(0.2), 0.0, 0.0, 1.0], 2 / 3),
    ],
)
def test_weights_of_responses(kind: str, wanted: list[float], changed: float) -> None:
    weights, whole, metrics = corrected(build_correction(section(rollout_is=kind)))
    assert weights == pytest.approx(wanted, abs=1e-6)
    assert whole == [1, 1, 1, 1]
    assert metrics == pytest.approx(
        {
            "rollout_corr/rejected": 0,
            "rollout_corr/is_weight": sum(wanted[:3]) / 3,
            "rollout_corr/is_changed": changed,
        },
        abs=1e-6,
    )


@pytest.mark.parametrize(
    ("fields", "kept", "vetoed"),
    [
        # of whole responses 1.22, 0.30, 3.32; of tokens in the geometric mean e^0.0667 = 1.069, e^-0.6 = 0.549, 3.32
        ({"rollout_rejection": "sequence", "bounds": (0.5, 2.0)}, [1, 0, 0, 1], None),
        ({"rollout_rejection": "sequence", "bounds": (0.3, 1.2)}, [0, 1, 0, 1], None),
        ({"rollout_rejection": "geometric", "bounds": (0.5, 2.0)}, [1, 1, 0, 1], None),
        ({"rollout_rejection": "geometric", "bounds": (0.99, 1.06)}, [0, 0, 0, 1], None),
        # e^-0.7 = 0.497 is the least likely token, e^-0.5 = 0.607 and e^-0.3 = 0.741 come next
        ({"rollout_veto": 0.5}, [1, 0, 1, 1], 1 / 3),
        ({"rollout_veto": 0.75}, [0, 0, 1, 1], 2 / 3),
        ({"rollout_veto": 0.5, "rollout_rejection": "geometric", "bounds": (0.5, 2.0)}, [1, 0, 0, 1], 1 / 3),
    ],
)
def test_rejected_responses(fields: dict[str, Any], kept: list[int], vetoed: float | None) -> None:
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
        ratio = math.exp(math.fsum(row))  # up to e^500: no overflow on the way
        assert one == pytest.approx(min(ratio, 3.0), rel=1e-4)
        assert other == (pytest.approx(ratio, rel=1e-4) if 0.5 <= ratio <= 3.0 else 0)


ALL = [
    {"rollout_is": "sequence_truncate"},
    {"rollout_is": "sequence_mask"},
    {"rollout_rejection": "sequence", "rollout_rejection_low": 1.0, "rollout_rejection_high": 1.0},
    {"rollout_rejection": "geometric", "rollout_rejection_low": 1.0, "rollout_rejection_high": 1.0},
    {"rollout_veto": 0.999},
]


@pytest.mark.parametrize("fields", ALL, ids=str)
def test_an_engine_that_agrees_changes_nothing(fields: dict[str, Any]) -> None:
    batch = batch_of([[0.0] * len(row) for row in LOG_RATIOS])
    found, metrics = correct_rollout(batch, build_correction(section(**fields)))
    assert metrics["rollout_corr/rejected"].result() == 0
    for one, before in zip(found.sequences, batch.sequences, strict=True):
        assert torch.equal(one.loss_weights, before.loss_weights)
        assert torch.equal(one.rollout_weights, torch.ones(before.token_ids.numel()))


def test_nothing_is_done_without_need() -> None:
    for fields in ({}, {"rollout_is": "token_mask"}):
        batch = batch_of(LOG_RATIOS)
        found, metrics = correct_rollout(batch, build_correction(section(**fields)))
        assert found is batch
        assert metrics == {}


@pytest.mark.parametrize("rejection", ["sequence", "geometric"])
def test_values_that_are_no_numbers_are_rejected(rejection: str) -> None:
    config = section(rollout_rejection=rejection, rollout_rejection_low=0.0, rollout_rejection_high=1e30)
    _, whole, _ = corrected(build_correction(config), [[0.1, math.nan], [0.1, math.inf], [0.1]])
    assert whole == [0, 0, 1]


BOTH = section(
    rollout_is="sequence_truncate",
    rollout_is_high=1.5,
    rollout_rejection="geometric",
    rollout_rejection_low=0.6,
    rollout_rejection_high=2.0,
    rollout_veto=0.25,
)
# kept with weight e^0.2; rejected by its mean; cut to 1.5; rejected by one token; a weight below one
SPLIT = [[0.1, -0.3, 0.4], [-0.5, -0.7], [0.6], [0.2, 0.4, -1.4, 0.6, 0.1, 0.2], [-0.1, 0.0, -0.2, -0.3, 0.1]]
WEIGHTS = [math.exp(0.2), 0.0, 1.5, 0.0, math.exp(-0.5)]
ADVANTAGES = [1.0, -2.0, 0.5, 3.0, -1.0]
SHARES = [0.5, 1.0, 2.0, 1.0, 0.7]


def moved(place: int, token: int) -> float:
    """Current log-probability of a response's token minus the one before the update; some are clipped."""
    return 0.3 * math.sin(3.0 * place + token)


def by_hand() -> tuple[float, list[list[float]]]:
    """The loss, and its gradient for every token: over all 17 tokens, those of rejected responses counted in."""
    total, gradient = 0.0, []
    for place, row in enumerate(SPLIT):
        gradient.append([])
        for token in range(len(row)):
            ratio, advantage = math.exp(moved(place, token)), ADVANTAGES[place]
            factor = WEIGHTS[place] * SHARES[place] / 17
            free, bounded = ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage
            total -= factor * min(free, bounded)
            gradient[-1].append(-factor * free if free <= bounded else 0.0)
    return total, gradient


@pytest.mark.parametrize("cp_size", [1, 2])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("split", [[[0, 1, 2, 3, 4]], [[4, 1], [3, 0, 2]], [[0], [1], [2], [3], [4]]], ids=str)
def test_loss_and_gradient_are_the_same_for_every_split(split: list[list[int]], packed: bool, cp_size: int) -> None:
    correction = build_correction(BOTH)
    batch, _ = correct_rollout(batch_of(SPLIT), correction)
    rows, sequences = [], []
    for place, sequence in enumerate(batch.sequences):
        current = sequence.old_logprobs.clone()
        current[PROMPT:] += torch.tensor([moved(place, token) for token in range(len(SPLIT[place]))])
        rows.append(current.requires_grad_())
        ones = torch.ones(current.numel())
        sequences.append(
            replace(
                sequence,
                advantages=ones * ADVANTAGES[place],
                loss_weights=sequence.loss_weights * SHARES[place],
                ref_logprobs=rows[-1],  # which travels to its place
            )
        )
    loss_of = PolicyLoss(build_objective(section()), correction, has_rollout_logprobs=True, has_old_logprobs=True)
    total, count = torch.zeros(()), 0
    for places in split:
        multiple = 2 * cp_size if cp_size > 1 else 1
        whole = align(
            [sequences[i] for i in places], packed=packed, multiple_of=multiple, sequence_multiple_of=multiple
        )
        for rank in range(cp_size):
            share = context_share(whole, rank, cp_size)
            logprobs = share.ref_logprobs[share.loss_mask]
            loss, number, _ = loss_of(share, logprobs, torch.zeros_like(logprobs))
            total, count = total + loss, count + int(number)
    assert count == 17
    wanted, gradient = by_hand()
    assert float(total.detach() / count) == pytest.approx(wanted, abs=1e-6)
    for found, row in zip(torch.autograd.grad(total / count, rows), gradient, strict=True):
        assert found.tolist() == pytest.approx([0.0] * PROMPT + row, abs=1e-6)


def found_by(split: list[list[int]], rows: Sequence[Sequence[float]]) -> dict[str, Reduction]:
    """The metrics of a batch's first update."""
    sequences = batch_of(rows).sequences
    loss_of = PolicyLoss(
        build_objective(section()), build_correction(section()), has_rollout_logprobs=True, has_old_logprobs=True
    )
    parts = []
    for places in split:
        batch = align([sequences[i] for i in places], packed=True)
        logprobs = batch.old_logprobs[batch.loss_mask]
        parts.append(loss_of(batch, logprobs, torch.zeros_like(logprobs))[2])
    return merge(parts)


@pytest.mark.parametrize("split", [[[0, 1, 2, 3]], [[3, 1], [2, 0]], [[0], [1], [2], [3]]], ids=str)
def test_what_every_step_says_of_the_difference(split: list[list[int]]) -> None:
    flat = list(itertools.chain(*LOG_RATIOS))
    ratios = [math.exp(x) for x in flat]
    values = results(found_by(split, LOG_RATIOS))
    wanted = {
        "train_rollout_logprob_abs_diff/mean": sum(map(abs, flat)) / 6,
        "train_rollout_logprob_abs_diff/max": 1.2,
        "rollout_corr/k3_kl": sum(math.exp(x) - 1 - x for x in flat) / 6,
        "rollout_corr/chi2_token": sum(r * r for r in ratios) / 6 - 1,
        "rollout_corr/ess": sum(ratios) ** 2 / (6 * sum(r * r for r in ratios)),
    }
    assert {name: values[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)


def test_a_warning_names_the_worst_tokens() -> None:
    """A response's token number n is its sequence's number n after two of the prompt, and has the id of its place."""
    metrics = found_by([[0, 1], [2, 3]], LOG_RATIOS)
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
