"""Per-token estimators of KL(policy || reference) from samples of the policy."""

from collections.abc import Callable

from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(p/q): unbiased, high variance, may be negative. Shapes: any, equal. Source: Schulman, 2020."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(p/q)^2 / 2: biased, low variance. Shapes: any, equal. Source: Schulman, 2020."""
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """q/p - log(q/p) - 1: unbiased, low variance, never negative. Source: Schulman, 2020; GRPO eq. 4."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1


def adapted_coef(coef: float, kl: float, target: float, num_responses: int, horizon: int) -> float:
    """Return the coefficient of a KL penalty after one step of the adaptive KL controller.

    Args:
        coef: current coefficient.
        kl: mean KL divergence of the step's responses, in nats per response.
        target: target of the KL divergence, in nats per response.
        num_responses: number of the step's responses.
        horizon: responses after which a KL divergence of 1.2 times the target or more has raised the coefficient by
            20 %.

    Source: arXiv 1909.08593 section 2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * num_responses / horizon)


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
