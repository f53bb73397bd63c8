"""The per-token objective of the policy: policy loss, KL to the reference model, entropy bonus."""

from dataclasses import dataclass

from torch import Tensor

from megatron_rl.algorithms.kl import KL_ESTIMATORS
from megatron_rl.algorithms.losses import LOSSES, Clip, LossFunction, LossInputs
from megatron_rl.config.algorithm import AlgorithmSection
from megatron_rl.config.plugins import load_symbol


@dataclass(frozen=True, kw_only=True)
class ObjectiveTerms:
    """Per-token terms of the objective, all of the same shape; gradients flow through ``total``."""

    total: Tensor
    policy: Tensor
    clipped: Tensor
    kl: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Objective:
    """rollout weight * policy loss + kl_coef * KL - entropy_coef * entropy, per token."""

    loss: LossFunction
    clip: Clip
    kl_coef: float
    kl_estimator: str
    kl_unbiased: bool
    """Multiply the KL by the ratio of current to old probability, so that its gradient is unbiased for samples of the
    old policy."""
    entropy_coef: float

    def __call__(
        self, tokens: LossInputs, ref_logprobs: Tensor, rollout_weights: Tensor, entropy: Tensor
    ) -> ObjectiveTerms:
        """Compute the objective.

        Args:
            tokens: inputs of the policy loss.
            ref_logprobs: log-probabilities under the reference model.
            rollout_weights: importance weights of the policy loss.
            entropy: entropy of the policy's distribution.
        """
        policy = self.loss(tokens, self.clip)
        weighted = rollout_weights * policy.loss
        total, kl = weighted, None
        if self.kl_coef:
            kl = KL_ESTIMATORS[self.kl_estimator](tokens.logprobs, ref_logprobs)
            if self.kl_unbiased:
                kl = (tokens.logprobs - tokens.old_logprobs).exp() * kl
            total = total + self.kl_coef * kl
        if self.entropy_coef:
            total = total - self.entropy_coef * entropy
        return ObjectiveTerms(total=total, policy=weighted, clipped=policy.clipped, kl=kl)


def build_objective(config: AlgorithmSection) -> Objective:
    """Return the objective of a configuration.

    Raises:
        ConfigError: ``algorithm.loss`` is neither a registered name nor an importable ``package.module:symbol``.
    """
    return Objective(
        loss=load_symbol(config.loss, LOSSES, "algorithm.loss"),
        clip=Clip(low=config.clip_ratio_low, high=config.clip_ratio_high, dual=config.clip_ratio_dual),
        kl_coef=config.kl_coef,
        kl_estimator=config.kl_estimator,
        kl_unbiased=config.kl_unbiased,
        entropy_coef=config.entropy_coef,
    )
