"""Per-token policy losses; how they are averaged is decided by the loss weights alone."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """The loss of every token and what is worth knowing about it."""

    loss: Tensor
    """Any shape; gradients flow to the log-probabilities."""
    clipped: Tensor
    """Same shape, bool: the clip took the gradient away."""


LossFunction = Callable[..., TokenLoss]


def clipped_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_ratio_low: float, clip_ratio_high: float
) -> TokenLoss:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A).

    Args:
        logprobs: current log-probabilities, any shape, float.
        old_logprobs: before the update, same shape, no gradient.
        advantages: same shape.

    Source: PPO, arXiv 1707.06347 eq. 7; separate bounds from DAPO, arXiv 2503.14476 eq. 10.
    """
    ratio = (logprobs - old_logprobs).exp()
    free = ratio * advantages
    bounded = ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high) * advantages
    return TokenLoss(loss=-torch.minimum(free, bounded), clipped=bounded < free)


def nll_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_ratio_low: float, clip_ratio_high: float
) -> TokenLoss:
    """-log p(token): supervised fine-tuning. The other arguments are those of every loss and have no effect."""
    return TokenLoss(loss=-logprobs, clipped=torch.zeros_like(logprobs, dtype=torch.bool))


LOSSES: dict[str, LossFunction] = {"clipped": clipped_loss, "nll": nll_loss}
