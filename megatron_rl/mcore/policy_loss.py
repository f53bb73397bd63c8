"""Sum of weight times token loss over a micro-batch, with what the metrics need."""

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

DRIFT = "train_rollout_logprob_abs_diff/mean"
WORST = "train_rollout_logprob_abs_diff/max"


class PolicyLoss:
    """Called with the log-probabilities and entropies of the tokens with loss."""

    def __init__(
        self,
        objective: Objective,
        correction: RolloutCorrection,
        *,
        on_samples: bool,
        scored_before: bool,
        context_group: Any = None,
    ) -> None:
        """
        Args:
            correction: whose weights of tokens are found here; those of responses are in the batch.
            on_samples: the policy sampled the sequences; demonstrations have no log-probabilities of before.
            scored_before: the batch holds the log-probabilities before the update; otherwise the weights have
                not changed since, and the current ones are those.
            context_group: the ranks that share out a sequence's tokens; None: this one has all of them.
        """
        self._objective = objective
        self._correction = correction
        self._on_samples = on_samples
        self._scored_before = scored_before
        self._context_group = context_group

    def __call__(
        self, batch: MicroBatch, logprobs: Tensor, entropy: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Reduction]]:
        """(loss sum, number of tokens, metrics) of [K] values at the true places of the loss mask."""
        mask = batch.loss_mask
        weights = batch.loss_weights[mask]
        old = batch.old_logprobs[mask] if self._scored_before else logprobs.detach()
        rollout = batch.rollout_logprobs[mask]
        by_token = self._correction.level == "token"
        corrections = self._correction.token_weights(old, rollout) if by_token else batch.rollout_weights[mask]
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
        if self._on_samples:
            sums["actor/pg_clipfrac"] = terms.clipped.sum()
            sums["actor/ppo_kl"] = k1(old, logprobs).sum()
        if terms.kl is not None:
            sums["actor/kl_loss"] = terms.kl.sum()
        if by_token:
            sums["rollout_corr/is_weight"] = corrections.sum()
            sums["rollout_corr/is_changed"] = (corrections != token_ratio(old, rollout)).float().sum()
        metrics = _means(sums, logprobs.numel())
        if self._on_samples:
            metrics |= _drift(old, rollout, batch.labels[mask], batch.position_ids[mask] + 1)
        # the sum keeps a path to the weights also when no token has a loss
        return loss + 0.0 * logprobs.sum(), mask.sum().int(), metrics

    def _mean_of_response(self, batch: MicroBatch, values: Tensor) -> Tensor:
        """[K] values of tokens -> [K], for each the mean over its whole response, wherever its tokens are."""
        places = batch.sequence[batch.loss_mask]
        both = torch.stack([values.detach(), torch.ones_like(values)]).double()
        sums = both.new_zeros(2, len(batch.lengths)).index_add_(1, places, both)
        if self._context_group is not None:
            dist.all_reduce(sums, group=self._context_group)
        return (sums[0] / sums[1])[places].to(values.dtype)


def _means(sums: dict[str, Tensor], count: int) -> dict[str, Reduction]:
    values = torch.stack([value.detach().float() for value in sums.values()]).tolist()  # one wait for the device
    return {name: Mean(value, count) for name, value in zip(sums, values, strict=True)}


def _drift(trainer: Tensor, engine: Tensor, token_ids: Tensor, positions: Tensor) -> dict[str, Reduction]:
    """How far the trainer's log-probabilities are from those the engine sampled with, and for which tokens most.

    Args:
        trainer: [K] before the update.
        engine: [K].
        token_ids: [K].
        positions: [K], of each token in its sequence.
    """
    if not trainer.numel():
        return {}
    difference, ratio = (trainer - engine).abs(), (trainer - engine).double().exp()
    count = difference.numel()
    worst = difference.topk(min(NUM_LARGEST, count)).indices
    columns = [values[worst].double() for values in (difference, token_ids, positions, trainer, engine)]
    sums = [difference.sum(), k3(engine, trainer).sum(), ratio.sum(), ratio.square().sum()]
    numbers = torch.cat([torch.stack([value.double() for value in sums]), *columns])
    total, divergence, first, second, *rest = numbers.tolist()  # one wait for the device
    places = [_place(*(rest[row :: worst.numel()])) for row in range(worst.numel())]
    return {
        DRIFT: Mean(total, count),
        WORST: Largest(tuple(places)),
        "rollout_corr/k3_kl": Mean(divergence, count),
        # the mean of squared ratios is 1 + chi-square
        "rollout_corr/chi2_token": Mean(second - count, count),
        "rollout_corr/ess": EffectiveShare(first, second, count),
    }


def _place(difference: float, token_id: float, position: float, trainer: float, engine: float) -> tuple[float, str]:
    """A difference, and where to look for it."""
    return difference, f"token {token_id:.0f} at position {position:.0f}: trainer {trainer:.3f}, engine {engine:.3f}"
