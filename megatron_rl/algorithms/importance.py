"""Corrections for samples that another distribution gave: the engine's, not the trainer's.

Engine and trainer compute the same weights with other kernels and precisions, so the policy gradient is slightly
off-policy even in the first update. The ratio of the trainer's probability before the update to the engine's weighs
each token's policy loss; truncated or masked, so that its variance stays bounded.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def truncated(ratio: Tensor, low: float, high: float) -> Tensor:
    """min(ratio, high): biased where it cuts, never larger. Source: Yao et al., 2025 (TIS); Ionides, 2008.

    Shapes: any. ``low`` is not used.
    """
    return ratio.clamp(max=high)


def masked(ratio: Tensor, low: float, high: float) -> Tensor:
    """The ratio where it lies in [low, high], else 0: outliers do not teach. Source: IcePop, 2025. Shapes: any."""
    return torch.where((ratio >= low) & (ratio <= high), ratio, torch.zeros_like(ratio))


ROLLOUT_WEIGHTS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "token_truncate": truncated,
    "token_mask": masked,
}


def rollout_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, kind: str, *, low: float, high: float
) -> Tensor | None:
    """Weights of the tokens' policy losses, without gradient; None when ``kind`` is "none".

    Args:
        old_logprobs: the trainer's before the update, any shape.
        rollout_logprobs: the engine's, same shape.
    """
    if kind == "none":
        return None
    return ROLLOUT_WEIGHTS[kind]((old_logprobs - rollout_logprobs).detach().exp(), low, high)
