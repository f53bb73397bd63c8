"""Unreduced losses of policies, critics and reward models; loss_weights.py decides how they are averaged."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """Inputs of a policy loss: values per token, all of the same shape."""

    logprobs: Tensor
    """Current log-probabilities, with gradient."""
    old_logprobs: Tensor
    """Log-probabilities before the update, without gradient."""
    advantages: Tensor
    mean_of_response: Callable[[Tensor], Tensor]
    """Function of values per token: for each token, the mean over its whole response, without gradient."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Clip range of the ratio of current to old probability."""

    low: float = 0.2
    """Where the advantage is negative, ratios below 1 - low are clipped to it."""
    high: float = 0.2
    """Where the advantage is positive, ratios above 1 + high are clipped to it."""
    dual: float | None = None
    """Where the advantage is negative, ratios above this are clipped to it (dual clip); None: no upper bound."""


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """The loss of every token, and where it was clipped."""

    loss: Tensor
    """Any shape; has the gradient to the log-probabilities."""
    clipped: Tensor
    """Same shape, bool; True where clipping removed the gradient or bounded its weight."""


LossFunction = Callable[[LossInputs, Clip], TokenLoss]


def ppo_clip_loss(tokens: LossInputs, clip: Clip) -> TokenLoss:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), and for A < 0 at most -dual A.

    Source: PPO, arXiv 1707.06347 eq. 7; separate bounds from DAPO, arXiv 2503.14476 eq. 10; the dual clip from
    arXiv 1912.09729 eq. 5, which TRL and INTELLECT-2 call two-sided clipping with delta.
    """
    return _surrogate((tokens.logprobs - tokens.old_logprobs).exp(), tokens.advantages, clip)


def gspo_loss(tokens: LossInputs, clip: Clip) -> TokenLoss:
    """The clipped surrogate with the geometric mean of a response's token ratios in place of each token's ratio.

    The ratio of a token has the value of its response's ratio and the gradient of its own. With aggregation
    sequence_mean this equals GSPO in value and gradient if all tokens of a response have the same advantage, and
    GSPO-token otherwise.

    Source: GSPO, arXiv 2507.18071 eq. 5 to 7 and 13 to 17. Its clip range is 3e-4 and 4e-4.
    """
    log_ratio = tokens.logprobs - tokens.old_logprobs
    zero_with_gradient = tokens.logprobs - tokens.logprobs.detach()
    ratio = (tokens.mean_of_response(log_ratio.detach()) + zero_with_gradient).exp()
    return _surrogate(ratio, tokens.advantages, clip)


def cispo_loss(tokens: LossInputs, clip: Clip) -> TokenLoss:
    """-min(ratio, 1 + high) A log p(token), without gradient through the ratio; every token keeps its gradient.

    Source: MiniMax-M1, arXiv 2506.13585 eq. 4 and 5, without the lower bound, which the paper does not use either.
    """
    ratio = (tokens.logprobs - tokens.old_logprobs).detach().exp()
    bound = 1 + clip.high
    return TokenLoss(loss=-ratio.clamp(max=bound) * tokens.advantages * tokens.logprobs, clipped=ratio > bound)


def policy_gradient_loss(tokens: LossInputs, clip: Clip) -> TokenLoss:
    """-A log p(token), REINFORCE; old log-probabilities and ``clip`` are not used. Source: Williams, 1992."""
    return TokenLoss(loss=-tokens.advantages * tokens.logprobs, clipped=_never(tokens))


def nll_loss(tokens: LossInputs, clip: Clip) -> TokenLoss:
    """-log p(token), for supervised fine-tuning; the other inputs are not used."""
    return TokenLoss(loss=-tokens.logprobs, clipped=_never(tokens))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> TokenLoss:
    """Half the squared error of a critic; with clipping, the larger of the errors of the value and the clipped value.

    Args:
        values: [K], with gradient.
        old_values: [K], values before the update.
        returns: [K], the targets.
        clip: range around the old value to which a value is clipped; None: no clipping.

    Source: PPO's reference implementation (openai/baselines ppo2), as in InstructGPT's and verl's critics.
    """
    unclipped = (values - returns).square() / 2
    if clip is None:
        return TokenLoss(loss=unclipped, clipped=torch.zeros_like(unclipped, dtype=torch.bool))
    clipped = (old_values + (values - old_values).clamp(-clip, clip) - returns).square() / 2
    return TokenLoss(loss=torch.maximum(unclipped, clipped), clipped=clipped > unclipped)


def pairwise_loss(chosen: Tensor, rejected: Tensor, margins: Tensor) -> Tensor:
    """-log sigmoid(chosen - rejected - margin), the loss of a reward model on pairs of responses.

    Args:
        chosen, rejected: [K] scores, with gradient.
        margins: [K], the margin by which the chosen score should be higher; 0 where none is given.

    Source: Bradley-Terry as in InstructGPT, arXiv 2203.02155 eq. 1; the margin from Llama 2, arXiv 2307.09288 eq. 2.
    """
    return -F.logsigmoid(chosen - rejected - margins)


def binary_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of scores as logits, the loss of a reward model on labelled responses or steps.

    Args:
        scores: [K], with gradient.
        labels: [K], from 0 to 1; values in between are fractions of correct continuations.

    Source: Math-Shepherd, arXiv 2312.08935 eq. 1 (responses) and 2 (steps), averaged over them.
    """
    return F.binary_cross_entropy_with_logits(scores, labels, reduction="none")


LOSSES: dict[str, LossFunction] = {
    "ppo_clip": ppo_clip_loss,
    "gspo": gspo_loss,
    "cispo": cispo_loss,
    "policy_gradient": policy_gradient_loss,
    "nll": nll_loss,
}


def _surrogate(ratio: Tensor, advantages: Tensor, clip: Clip) -> TokenLoss:
    unclipped = ratio * advantages
    bounded = ratio.clamp(1 - clip.low, 1 + clip.high) * advantages
    objective = torch.minimum(unclipped, bounded)
    clipped = bounded < unclipped
    if clip.dual is not None:
        lowest = torch.where(advantages < 0, clip.dual * advantages, -torch.inf)
        objective, clipped = torch.maximum(objective, lowest), clipped | (lowest > objective)
    return TokenLoss(loss=-objective, clipped=clipped)


def _never(tokens: LossInputs) -> Tensor:
    return torch.zeros_like(tokens.logprobs, dtype=torch.bool)
