"""What engine and trainer make of the same responses, turned into weights of a batch."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from megatron_rl.algorithms.importance import RolloutCorrection
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.distributed.collectives import gather_objects
from megatron_rl.errors import TrainingDiverged
from megatron_rl.mcore.policy_loss import DRIFT, WORST
from megatron_rl.metrics.metric import Largest, Mean, Reduction, merge
from megatron_rl.types import ParallelContext, TrainBatch


def correct_rollout(batch: TrainBatch, correction: RolloutCorrection) -> tuple[TrainBatch, dict[str, Reduction]]:
    """Weigh and reject whole responses.

    A rejected response has weight 0 in the whole loss, KL and entropy as well. Its tokens still count where the loss
    is normalised: so the others teach neither more nor less than without it, and no rank has to ask another.

    Args:
        batch: with the trainer's log-probabilities, if the correction needs whole responses.

    Returns:
        the batch, and means over the responses with loss: the same on the ranks that share them.
    """
    if not correction.needs_responses:
        return batch, {}
    found = [
        correction.of_response(sequence.old_logprobs[sequence.loss_mask], sequence.rollout_logprobs[sequence.loss_mask])
        for sequence in batch.sequences
    ]
    sequences = [
        replace(
            sequence,
            loss_weights=torch.zeros_like(sequence.loss_weights) if one.is_rejected else sequence.loss_weights,
            rollout_weights=torch.full_like(sequence.rollout_weights, one.weight),
        )
        for sequence, one in zip(batch.sequences, found, strict=True)
    ]
    counted = [one for sequence, one in zip(batch.sequences, found, strict=True) if sequence.loss_mask.any()]
    sums: dict[str, float] = {"rollout_corr/rejected": sum(one.is_rejected for one in counted)}
    if correction.veto is not None:
        sums["rollout_corr/vetoed"] = sum(one.is_vetoed for one in counted)
    if correction.level == "sequence":
        sums["rollout_corr/is_weight"] = sum(one.weight for one in counted)
        sums["rollout_corr/is_changed"] = sum(one.is_changed for one in counted)
    return replace(batch, sequences=sequences), {name: Mean(value, len(counted)) for name, value in sums.items()}


def check_logprob_mismatch(
    metrics: Mapping[str, Reduction], config: RolloutSection, parallel: ParallelContext, note: Callable[[str], None]
) -> None:
    """Warn above one difference and stop above another; collective.

    Args:
        metrics: of this rank's updates; empty of it where no tokens were scored.

    Raises:
        TrainingDiverged: on every rank.
    """
    found = merge(gather_objects({name: metrics[name] for name in (DRIFT, WORST) if name in metrics}, parallel))
    if DRIFT not in found:
        return
    drift, worst = found[DRIFT].result(), found[WORST]
    assert isinstance(worst, Largest)
    tokens = "Most apart: " + "; ".join(place for _, place in worst.found) + "."
    if config.drift_limit is not None and not drift <= config.drift_limit:  # NaN as well
        raise TrainingDiverged(
            f"the log-probabilities of trainer and engine differ by {drift:.3g} nats in the mean, more than "
            f"rollout.drift_limit={config.drift_limit:g}: the samples are not the policy's. Look at the precision of "
            "both, at the temperature, and at weight_sync/probe_difference; or raise the limit. " + tokens
        )
    if config.drift_warning is not None and drift > config.drift_warning:
        note(
            f"warning: trainer and engine differ by {drift:.3g} nats in the mean (rollout.drift_warning="
            f"{config.drift_warning:g}); algorithm.rollout_is=token_truncate corrects for it. {tokens}"
        )
