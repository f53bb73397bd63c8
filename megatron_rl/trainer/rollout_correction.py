"""Correct for the log-prob mismatch between engine and trainer, and check how large it is."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from megatron_rl.algorithms.importance import RolloutCorrection
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.distributed.collectives import gather_objects
from megatron_rl.errors import TrainingDiverged
from megatron_rl.mcore.policy_loss import MISMATCH_MAX, MISMATCH_MEAN
from megatron_rl.metrics.metric import Largest, Mean, Reduction, merge
from megatron_rl.types import ParallelContext, TrainBatch


def correct_rollout(batch: TrainBatch, correction: RolloutCorrection) -> tuple[TrainBatch, dict[str, Reduction]]:
    """Set the importance weights of whole responses, and reject responses.

    A rejected response has weight 0 in the whole loss, KL and entropy terms included. Its tokens still count in the
    loss normalisation, so the other responses keep their weights and no communication is needed.

    Args:
        batch: has ``old_logprobs`` if the correction needs whole responses.

    Returns:
        The batch, and means over the responses with loss; they are equal on ranks that share the same responses.
    """
    if not correction.needs_whole_responses:
        return batch, {}
    corrections = [
        correction.correct_response(
            sequence.old_logprobs[sequence.loss_mask], sequence.rollout_logprobs[sequence.loss_mask]
        )
        for sequence in batch.sequences
    ]
    sequences = [
        replace(
            sequence,
            loss_weights=torch.zeros_like(sequence.loss_weights) if result.is_rejected else sequence.loss_weights,
            rollout_weights=torch.full_like(sequence.rollout_weights, result.weight),
        )
        for sequence, result in zip(batch.sequences, corrections, strict=True)
    ]
    counted = [
        result for sequence, result in zip(batch.sequences, corrections, strict=True) if sequence.loss_mask.any()
    ]
    sums: dict[str, float] = {"rollout_corr/rejected": sum(result.is_rejected for result in counted)}
    if correction.veto is not None:
        sums["rollout_corr/vetoed"] = sum(result.is_vetoed for result in counted)
    if correction.level == "sequence":
        sums["rollout_corr/is_weight"] = sum(result.weight for result in counted)
        sums["rollout_corr/is_changed"] = sum(result.is_changed for result in counted)
    return replace(batch, sequences=sequences), {name: Mean(value, len(counted)) for name, value in sums.items()}


def check_logprob_mismatch(
    metrics: Mapping[str, Reduction], config: RolloutSection, parallel: ParallelContext, note: Callable[[str], None]
) -> None:
    """Warn if the log-prob mismatch is above ``rollout.drift_warning``, raise above ``drift_limit``; collective.

    Args:
        metrics: metrics of this rank's updates; they lack the mismatch if no tokens were scored.
        note: prints a warning.

    Raises:
        TrainingDiverged: on every rank, if the mismatch is above the limit or NaN.
    """
    own = {name: metrics[name] for name in (MISMATCH_MEAN, MISMATCH_MAX) if name in metrics}
    merged = merge(gather_objects(own, parallel))
    if MISMATCH_MEAN not in merged:
        return
    mismatch, largest = merged[MISMATCH_MEAN].result(), merged[MISMATCH_MAX]
    assert isinstance(largest, Largest)
    tokens = "Largest differences: " + "; ".join(label for _, label in largest.entries) + "."
    if config.drift_limit is not None and not mismatch <= config.drift_limit:  # NaN as well
        raise TrainingDiverged(
            f"the log-probabilities of trainer and engine differ by {mismatch:.3g} nats on average, more "
            f"than rollout.drift_limit={config.drift_limit:g}: the engine does not sample from the trainer's policy. "
            "Check the precision of both, the temperature and the metric weight_sync/probe_difference; or raise the "
            "limit. " + tokens
        )
    if config.drift_warning is not None and mismatch > config.drift_warning:
        note(
            f"warning: trainer and engine differ by {mismatch:.3g} nats on average (rollout.drift_warning="
            f"{config.drift_warning:g}); algorithm.rollout_is=token_truncate corrects for it. {tokens}"
        )
