"""Losses of policies, critics and reward models, value by value; how they are averaged is decided elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """Values of tokens, all of one shape."""

    logprobs: Tensor
    """Current log-probabilities; gradients flow to them."""
    old_logprobs: Tensor
    """Before the update, no gradient."""
    advantages: Tensor
    mean_of_response: Callable[[Tensor], Tensor]
    """Values of tokens -> for each token their mean over its whole response, without gradient."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Bounds of the ratio of the current to the old probability."""

    low: float = 0.2
    """Below 1 - low it counts as that, where the advantage is negative."""
    high: float = 0.2
    """Above 1 + high it counts as that, where the advantage is positive."""
    dual: float | None = None
    """Above this it counts as this, where the advantage is negative; None: unbounded."""


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """The loss of every token and what is worth knowing about it."""

    loss: Tensor
    """Any shape; gradients flow to the log-probabilities."""
    clipped: Tensor
    """Same shape, bool: the clip took the gradient away, or bounded its weight."""


LossFunction = Callable[[LossInputs, Clip], TokenLoss]


def ppo_clip_loss(tokens: LossInputs, clip: Clip) -> TokenLoss:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), and for A < 0 at most -dual A.

    Source: PPO, arXiv 1707.06347 eq. 7; separate bounds from DAPO, arXiv 2503.14476 eq. 10; the second bound from
    dual-clip PPO, arXiv 1912.09729 eq. 5, which TRL and INTELLECT-2 write as two-sided clipping with delta.
    """
    return _surrogate((tokens.logprobs - tokens.old_logprobs).exp(), tokens.advantages, clip)


def gspo_loss(tokens: LossInputs, clip: Clip) -> TokenLoss:
    """The clipped loss with the geometric mean of a response's ratios in place of each token's.

    Written for tokens: the ratio's value is the response's, its gradient the token's own. Averaged over sequences
    (aggregation: sequence_mean) that is GSPO in value and gradient, as all tokens of a response have one advantage;
    where they differ it is GSPO-token.

    Source: GSPO, arXiv 2507.18071 eq. 5 to 7 and 13 to 17. Its bounds are 3e-4 and 4e-4.
    """
    log_ratio = tokens.logprobs - tokens.old_logprobs
    own = tokens.logprobs - tokens.logprobs.detach()
    return _surrogate((tokens.mean_of_response(log_ratio.detach()) + own).exp(), tokens.advantages, clip)


def cispo_loss(tokens: LossInputs, clip: Clip) -> TokenLoss:
    """-min(ratio, 1 + high) A log p(token), without gradient through the ratio: no token loses its gradient.

    Source: MiniMax-M1, arXiv 2506.13585 eq. 4 and 5, without their lower bound, which they do not use either.
    """
    ratio = (tokens.logprobs - tokens.old_logprobs).detach().exp()
    bound = 1 + clip.high
    return TokenLoss(loss=-ratio.clamp(max=bound) * tokens.advantages * tokens.logprobs, clipped=ratio > bound)


def policy_gradient_loss(tokens: LossInputs, clip: Clip) -> TokenLoss:
    """-A log p(token): REINFORCE; old log-probabilities and bounds have no effect. Source: Williams, 1992."""
    return TokenLoss(loss=-tokens.advantages * tokens.logprobs, clipped=_none(tokens))


def nll_loss(tokens: LossInputs, clip: Clip) -> TokenLoss:
    """-log p(token): supervised fine-tuning; nothing else has an effect."""
    return TokenLoss(loss=-tokens.logprobs, clipped=_none(tokens))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> TokenLoss:
    """Half the squared error of a critic; with a clip the larger one of it and that of the value kept near the old one.

    Args:
        values: [K], gradients flow to them.
        old_values: [K], before the update.
        returns: [K].
        clip: how far a value may go from the old one before its gradient ends; None: as far as it likes.

    Source: PPO's reference implementation (openai/baselines ppo2), as in InstructGPT's and verl's critics.
    """
    free = (values - returns).square() / 2
    if clip is None:
        return TokenLoss(loss=free, clipped=torch.zeros_like(free, dtype=torch.bool))
    bounded = (old_values + (values - old_values).clamp(-clip, clip) - returns).square() / 2
    return TokenLoss(loss=torch.maximum(free, bounded), clipped=bounded > free)


def pairwise_loss(chosen: Tensor, rejected: Tensor, margins: Tensor) -> Tensor:
    """-log sigmoid(chosen - rejected - margin): what a reward model learns from comparisons.

    Args:
        chosen, rejected: [K] scores, gradients flow to them.
        margins: [K], by how much the chosen one has to be better; 0 where nothing is known.

    Source: Bradley-Terry as in InstructGPT, arXiv 2203.02155 eq. 1; the margin from Llama 2, arXiv 2307.09288 eq. 2.
    """
    return -F.logsigmoid(chosen - rejected - margins)


def binary_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of scores as logits: what a reward model learns from judged responses, or judged steps.

    Args:
        scores: [K], gradients flow to them.
        labels: [K] from 0 to 1; in between where only the share of right continuations is known.

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
    free = ratio * advantages
    bounded = ratio.clamp(1 - clip.low, 1 + clip.high) * advantages
    kept = torch.minimum(free, bounded)
    clipped = bounded < free
    if clip.dual is not None:
        lowest = torch.where(advantages < 0, clip.dual * advantages, -torch.inf)
        kept, clipped = torch.maximum(kept, lowest), clipped | (lowest > kept)
    return TokenLoss(loss=-kept, clipped=clipped)


def _none(tokens: LossInputs) -> Tensor:
    return torch.zeros_like(tokens.logprobs, dtype=torch.bool)
