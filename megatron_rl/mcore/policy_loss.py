"""The policy loss of a micro-batch, and its metrics."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.algorithms.importance import RolloutCorrection, token_ratio
from megatron_rl.algorithms.kl import k1, k3
from megatron_rl.algorithms.losses import LossInputs
from megatron_rl.algorithms.objective import Objective
from megatron_rl.metrics.metric import NUM_LARGEST, EffectiveShare, Largest, Mean, Reduction
from megatron_rl.types import MicroBatch

MISMATCH_MEAN = "train_rollout_logprob_abs_diff/mean"
MISMATCH_MAX = "train_rollout_logprob_abs_diff/max"


class PolicyLoss:
    """The weighted sum of token losses, called with the log-probabilities and entropies of the tokens with loss."""

    def __init__(
        self,
        objective: Objective,
        correction: RolloutCorrection,
        *,
        has_rollout_logprobs: bool,
        has_old_logprobs: bool,
        context_group: Any = None,
    ) -> None:
        """
        Args:
            objective: computes the token losses.
            correction: rollout correction; token-level weights are computed here, response-level weights are in the
                batch.
            has_rollout_logprobs: whether the policy sampled the sequences; demonstrations have no rollout or old
                log-probabilities.
            has_old_logprobs: whether the batch holds the log-probabilities before the update. If not, the weights have
                not changed since then and the current log-probabilities are used instead.
            context_group: context-parallel ranks, which split the tokens of a sequence; None if this rank has all of
                them.
        """
        self._objective = objective
        self._correction = correction
        self._has_rollout_logprobs = has_rollout_logprobs
        self._has_old_logprobs = has_old_logprobs
        self._context_group = context_group

    def __call__(
        self, batch: MicroBatch, logprobs: Tensor, entropy: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Reduction]]:
        """Return (loss sum, number of tokens with loss, metrics).

        Args:
            batch: the micro-batch.
            logprobs: [K] of the K tokens with loss, in the order of the loss mask.
            entropy: [K].
        """
        mask = batch.loss_mask
        weights = batch.loss_weights[mask]
        old = batch.old_logprobs[mask] if self._has_old_logprobs else logprobs.detach()
        rollout = batch.rollout_logprobs[mask]
        is_token_level = self._correction.level == "token"
        corrections = self._correction.token_weights(old, rollout) if is_token_level else batch.rollout_weights[mask]
        tokens = LossInputs(
            logprobs=logprobs,
            old_logprobs=old,
            advantages=batch.advantages[mask],
            mean_of_response=lambda values: self._mean_of_response(batch, values),
        )
        terms = self._objective(tokens, batch.ref_logprobs[mask], corrections, entropy)
        loss = (weights * terms.total).sum()
        sums = {
            "actor/loss": loss,
            "actor/pg_loss": (weights * terms.policy).sum(),
            "actor/entropy": entropy.sum(),
        }
        if self._has_rollout_logprobs:
            sums["actor/pg_clipfrac"] = terms.clipped.sum()
            sums["actor/ppo_kl"] = k1(old, logprobs).sum()
        if terms.kl is not None:
            sums["actor/kl_loss"] = terms.kl.sum()
        if is_token_level:
            sums["rollout_corr/is_weight"] = corrections.sum()
            sums["rollout_corr/is_changed"] = (corrections != token_ratio(old, rollout)).float().sum()
        metrics = _means(sums, logprobs.numel())
        if self._has_rollout_logprobs:
            metrics |= _mismatch_metrics(old, rollout, batch.labels[mask], batch.position_ids[mask] + 1)
        # adding 0 * logprobs keeps the graph connected to the weights when no token has loss
        return loss + 0.0 * logprobs.sum(), mask.sum().int(), metrics

    def _mean_of_response(self, batch: MicroBatch, values: Tensor) -> Tensor:
        """Replace each of [K] token values by the mean over its response, including tokens on other ranks."""
        sequence_of = batch.sequence[batch.loss_mask]
        value_and_count = torch.stack([values.detach(), torch.ones_like(values)]).double()
        sums = value_and_count.new_zeros(2, len(batch.lengths)).index_add_(1, sequence_of, value_and_count)
        if self._context_group is not None:
            dist.all_reduce(sums, group=self._context_group)
        return (sums[0] / sums[1])[sequence_of].to(values.dtype)


def _means(sums: dict[str, Tensor], count: int) -> dict[str, Reduction]:
    values = torch.stack([value.detach().float() for value in sums.values()]).tolist()  # one device synchronization
    return {name: Mean(value, count) for name, value in zip(sums, values, strict=True)}


def _mismatch_metrics(trainer: Tensor, engine: Tensor, token_ids: Tensor, positions: Tensor) -> dict[str, Reduction]:
    """Metrics of the log-prob mismatch between trainer and engine, with the tokens that differ most.

    Args:
        trainer: [K] the trainer's log-probabilities before the update.
        engine: [K] the log-probabilities that the engine sampled with.
        token_ids: [K] ids of the tokens.
        positions: [K] index of each token in its sequence.
    """
    if not trainer.numel():
        return {}
    difference, ratio = (trainer - engine).abs(), (trainer - engine).double().exp()
    count = difference.numel()
    largest = difference.topk(min(NUM_LARGEST, count)).indices
    columns = [values[largest].double() for values in (difference, token_ids, positions, trainer, engine)]
    sums = [difference.sum(), k3(engine, trainer).sum(), ratio.sum(), ratio.square().sum()]
    numbers = torch.cat([torch.stack([value.double() for value in sums]), *columns])
    total, divergence, first, second, *rest = numbers.tolist()  # one device synchronization
    described = [_described(*(rest[row :: largest.numel()])) for row in range(largest.numel())]
    return {
        MISMATCH_MEAN: Mean(total, count),
        MISMATCH_MAX: Largest(tuple(described)),
        "rollout_corr/k3_kl": Mean(divergence, count),
        # the mean of squared ratios is 1 + chi-square
        "rollout_corr/chi2_token": Mean(second - count, count),
        "rollout_corr/ess": EffectiveShare(first, second, count),
    }


def _described(difference: float, token_id: float, position: float, trainer: float, engine: float) -> tuple[float, str]:
    """Return a difference and a text that names the token."""
    return difference, f"token {token_id:.0f} at position {position:.0f}: trainer {trainer:.3f}, engine {engine:.3f}"
