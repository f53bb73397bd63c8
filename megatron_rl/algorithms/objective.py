"""The whole per-token objective: policy loss, KL to the reference, entropy bonus."""

from dataclasses import dataclass

from torch import Tensor

from megatron_rl.algorithms.kl import KL_ESTIMATORS
from megatron_rl.algorithms.losses import LOSSES, Clip, LossFunction, LossInputs
from megatron_rl.config.algorithm import AlgorithmSection
from megatron_rl.config.plugins import load_symbol


@dataclass(frozen=True, kw_only=True)
class ObjectiveTerms:
    """Per-token terms, all of one shape; ``total`` carries the gradient."""

    total: Tensor
    policy: Tensor
    clipped: Tensor
    kl: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Objective:
    """rollout weight * loss + kl_coef * KL - entropy_coef * entropy, token by token."""

    loss: LossFunction
    clip: Clip
    kl_coef: float
    kl_estimator: str
    kl_unbiased: bool
    """Weigh the KL by current / old probability, so that its gradient is right for samples of the old policy."""
    entropy_coef: float

    def __call__(
        self, tokens: LossInputs, ref_logprobs: Tensor, rollout_weights: Tensor, entropy: Tensor
    ) -> ObjectiveTerms:
        policy = self.loss(tokens, self.clip)
        weighed = rollout_weights * policy.loss
        total, kl = weighed, None
        if self.kl_coef:
            kl = KL_ESTIMATORS[self.kl_estimator](tokens.logprobs, ref_logprobs)
            if self.kl_unbiased:
                kl = (tokens.logprobs - tokens.old_logprobs).exp() * kl
            total = total + self.kl_coef * kl
        if self.entropy_coef:
            total = total - self.entropy_coef * entropy
        return ObjectiveTerms(total=total, policy=weighed, clipped=policy.clipped, kl=kl)


def build_objective(config: AlgorithmSection) -> Objective:
    """The objective of a configuration; a loss is a registered name or ``package.module:symbol``."""
    return Objective(
        loss=load_symbol(config.loss, LOSSES, "algorithm.loss"),
        clip=Clip(low=config.clip_ratio_low, high=config.clip_ratio_high, dual=config.clip_ratio_dual),
        kl_coef=config.kl_coef,
        kl_estimator=config.kl_estimator,
        kl_unbiased=config.kl_unbiased,
        entropy_coef=config.entropy_coef,
    )
