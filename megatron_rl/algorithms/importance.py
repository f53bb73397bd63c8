"""Rollout correction: importance weights and rejection for samples of the engine's distribution.

Engine and trainer compute with the same weights but different kernels and precisions, so the policy gradient is
slightly off-policy even in the first update. The policy loss is multiplied by the ratio of the trainer's probability
before the update to the engine's, per token or per response; the ratio is truncated or masked, so that its variance
stays bounded. Responses with extreme ratios can be rejected.

The ratio of a response needs all of its tokens, which context parallelism splits over ranks. Corrections of responses
are therefore computed on whole sequences, before micro-batches are made, and are stored in the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.config.algorithm import AlgorithmSection


def truncated(ratio: Tensor, low: float, high: float) -> Tensor:
    """min(ratio, high): truncated importance sampling, biased above ``high``; ``low`` is not used.

    Shapes: any. Source: Yao et al., 2025 (TIS); Ionides, 2008.
    """
    return ratio.clamp(max=high)


def masked(ratio: Tensor, low: float, high: float) -> Tensor:
    """The ratio if it is in [low, high], else 0, so that outliers have no loss. Shapes: any. Source: IcePop, 2025."""
    return torch.where((ratio >= low) & (ratio <= high), ratio, torch.zeros_like(ratio))


def token_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """Ratio of trainer to engine probability of every token, without gradient. Shapes: any, equal."""
    return (old_logprobs - rollout_logprobs).detach().exp()


def sequence_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """Ratio of trainer to engine probability of a whole response: the product of its token ratios.

    Args:
        old_logprobs: [R], the trainer's, of the tokens of the response.
        rollout_logprobs: [R], the engine's.

    Returns:
        [] float64; 1 for an empty response.

    Source: Liu, Li et al., 2025, "When speed kills stability" (sequence-level importance sampling).
    """
    return (old_logprobs - rollout_logprobs).double().sum().exp()


def geometric_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """Geometric mean of the token ratios of a response, so that long responses are not outliers by length alone.

    Shapes and source as in ``sequence_ratio``.
    """
    return ((old_logprobs - rollout_logprobs).double().sum() / max(1, old_logprobs.numel())).exp()


BOUNDS: dict[str, Callable[[Tensor, float, float], Tensor]] = {"truncate": truncated, "mask": masked}
RESPONSE_RATIOS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sequence": sequence_ratio,
    "geometric": geometric_ratio,
}


@dataclass(frozen=True, kw_only=True)
class ResponseCorrection:
    """Importance weight of one response, and whether it is rejected."""

    weight: float
    """Factor of the policy loss of every token; 1 unless the level is sequence."""
    is_changed: bool
    """Whether the weight was truncated or masked, so that it differs from the ratio."""
    is_vetoed: bool
    """Whether the response is rejected because the ratio of a single token is below the veto threshold."""
    is_rejected: bool
    """Whether the response is rejected for any reason."""


@dataclass(frozen=True, kw_only=True)
class RolloutCorrection:
    """Settings of the rollout correction, and its computation for tokens and responses."""

    level: str
    """none, token or sequence: whose ratio is the weight."""
    bound: str
    """truncate or mask: how weights are bounded."""
    low: float
    """Smallest weight that mask keeps."""
    high: float
    """Largest weight."""
    rejection: str
    """none, sequence or geometric: the ratio by which responses are rejected."""
    rejection_low: float
    """Smallest ratio that is accepted."""
    rejection_high: float
    """Largest ratio that is accepted."""
    veto: float | None
    """Responses with a token ratio below this are rejected; None: no veto."""

    @property
    def needs_whole_responses(self) -> bool:
        """Whether log-probabilities of whole responses are needed before the update.

        Weights of tokens are computed together with their loss and do not need them.
        """
        return self.level == "sequence" or self.rejection != "none" or self.veto is not None

    def token_weights(self, old_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
        """Weights of the policy loss of each token, without gradient. Shapes: any, equal."""
        return BOUNDS[self.bound](token_ratio(old_logprobs, rollout_logprobs), self.low, self.high)

    def correct_response(self, old_logprobs: Tensor, rollout_logprobs: Tensor) -> ResponseCorrection:
        """Compute the weight of a whole response and whether it is rejected.

        Args:
            old_logprobs: [R], the trainer's before the update, of the tokens with loss.
            rollout_logprobs: [R], the engine's.
        """
        weight, is_changed = 1.0, False
        if self.level == "sequence":
            ratio = sequence_ratio(old_logprobs, rollout_logprobs)
            weight = float(BOUNDS[self.bound](ratio, self.low, self.high))
            is_changed = weight != float(ratio)
        is_vetoed = False
        if self.veto is not None:
            is_vetoed = bool((token_ratio(old_logprobs, rollout_logprobs) < self.veto).any())
        is_rejected = is_vetoed
        if self.rejection != "none":
            ratio = RESPONSE_RATIOS[self.rejection](old_logprobs, rollout_logprobs)
            is_rejected |= not self.rejection_low <= float(ratio) <= self.rejection_high
        return ResponseCorrection(weight=weight, is_changed=is_changed, is_vetoed=is_vetoed, is_rejected=is_rejected)


def build_correction(config: AlgorithmSection) -> RolloutCorrection:
    """Return the rollout correction of a configuration."""
    level, _, bound = config.rollout_is.partition("_")
    low, high = config.rollout_rejection_low, config.rollout_rejection_high
    return RolloutCorrection(
        level=level,
        bound=bound,
        low=config.rollout_is_low,
        high=config.rollout_is_high,
        rejection=config.rollout_rejection,
        rejection_low=0.0 if low is None else low,
        rejection_high=float("inf") if high is None else high,
        veto=config.rollout_veto,
    )


def needs_old_logprobs(config: AlgorithmSection, correction: RolloutCorrection, *, num_updates: int) -> bool:
    """Whether the trainer's log-probabilities must be computed before the updates of a step.

    With a single update the loss can use its own log-probabilities, because the weights have not changed yet. Rollout
    correction of responses, the KL penalty and distillation need them earlier.

    Args:
        config: algorithm section of the run.
        correction: rollout correction of the run.
        num_updates: optimizer updates in the step.
    """
    used_in_advantages = config.kl_reward_coef > 0 or config.advantage == "distillation"
    return num_updates > 1 or correction.needs_whole_responses or used_in_advantages
