"""Corrections for samples that another distribution gave: the engine's, not the trainer's.

Engine and trainer compute the same weights with other kernels and precisions, so the policy gradient is slightly
off-policy even in the first update. The ratio of the trainer's probability before the update to the engine's weighs
the policy loss, token by token or response by response; truncated or masked, so that its variance stays bounded. A
response whose ratios are too far out can be rejected altogether.

The ratio of a response needs all of its tokens, and the ranks of context parallelism share those out. So everything
about responses is computed on whole sequences, before there are micro-batches, and travels with them as data.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.config.algorithm import AlgorithmSection


def truncated(ratio: Tensor, low: float, high: float) -> Tensor:
    """min(ratio, high): biased where it cuts, never larger. Source: Yao et al., 2025 (TIS); Ionides, 2008.

    Shapes: any. ``low`` is not used.
    """
    return ratio.clamp(max=high)


def masked(ratio: Tensor, low: float, high: float) -> Tensor:
    """The ratio where it lies in [low, high], else 0: outliers do not teach. Source: IcePop, 2025. Shapes: any."""
    return torch.where((ratio >= low) & (ratio <= high), ratio, torch.zeros_like(ratio))


def token_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """Trainer's probability / engine's of every token, without gradient. Shapes: any, equal."""
    return (old_logprobs - rollout_logprobs).detach().exp()


def sequence_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """Trainer's probability / engine's of a whole response: the product of its tokens' ratios.

    Args:
        old_logprobs: [R], of the response's tokens.
        rollout_logprobs: [R].

    Returns:
        [] float64; 1 for an empty response.

    Source: Liu, Li et al., 2025, "When speed kills stability" (sequence-level importance sampling).
    """
    return (old_logprobs - rollout_logprobs).double().sum().exp()


def geometric_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """The geometric mean of a response's token ratios, so that long responses are not outliers by length alone.

    Shapes and source as of ``sequence_ratio``.
    """
    return ((old_logprobs - rollout_logprobs).double().sum() / max(1, old_logprobs.numel())).exp()


BOUNDS: dict[str, Callable[[Tensor, float, float], Tensor]] = {"truncate": truncated, "mask": masked}
RESPONSE_RATIOS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sequence": sequence_ratio,
    "geometric": geometric_ratio,
}


@dataclass(frozen=True, kw_only=True)
class ResponseCorrection:
    """What its ratios make of one response."""

    weight: float
    """Of every token's policy loss; 1 where responses are not weighed."""
    is_changed: bool
    """The weight is not the ratio."""
    is_vetoed: bool
    """A single token is impossible enough to reject the response."""
    is_rejected: bool
    """For any reason."""


@dataclass(frozen=True, kw_only=True)
class RolloutCorrection:
    """Weights of tokens or of responses, and which responses are rejected."""

    level: str
    """none, token or sequence: whose ratio is a weight."""
    bound: str
    """truncate or mask."""
    low: float
    high: float
    rejection: str
    """none, sequence or geometric: by which ratio responses are rejected."""
    rejection_low: float
    rejection_high: float
    veto: float | None

    @property
    def needs_responses(self) -> bool:
        """Whole responses must have been scored; weights of tokens are found while their loss is taken."""
        return self.level == "sequence" or self.rejection != "none" or self.veto is not None

    def token_weights(self, old_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
        """Weights of the tokens' policy losses, without gradient. Shapes: any, equal."""
        return BOUNDS[self.bound](token_ratio(old_logprobs, rollout_logprobs), self.low, self.high)

    def of_response(self, old_logprobs: Tensor, rollout_logprobs: Tensor) -> ResponseCorrection:
        """What becomes of a response, all of it.

        Args:
            old_logprobs: [R] the trainer's before the update, of the tokens with loss.
            rollout_logprobs: [R] the engine's.
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
    """The correction of a configuration."""
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
    """Whether anything asks for the trainer's log-probabilities before the updates of a step.

    A single update finds its own: the weights are still those that would be asked. For what whole responses and
    returns are made of it is too late.
    """
    compared = config.kl_reward_coef > 0 or config.advantage == "distillation"
    return num_updates > 1 or correction.needs_responses or compared
