"""Whether engine and trainer still compute the same model, by every step's own samples."""

from collections.abc import Callable, Mapping

from megatron_rl.collective import gather_objects
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.errors import TrainingDiverged
from megatron_rl.mcore.policy_loss import DRIFT, WORST
from megatron_rl.metrics.metric import Largest, Reduction, merge
from megatron_rl.types import ParallelContext


def check_drift(
    metrics: Mapping[str, Reduction], config: RolloutSection, parallel: ParallelContext, note: Callable[[str], None]
) -> None:
    """Warn above one difference and stop above another; collective.

    Args:
        metrics: of this rank's updates; empty of it where no tokens were scored.

    Raises:
        TrainingDiverged: on every rank.
    """
    found = merge(gather_objects({name: metrics[name] for name in (DRIFT, WORST) if name in metrics}, parallel))
    if DRIFT not in found:
        return
    drift, worst = found[DRIFT].result(), found[WORST]
    assert isinstance(worst, Largest)
    tokens = "Most apart: " + "; ".join(place for _, place in worst.found) + "."
    if config.drift_limit is not None and not drift <= config.drift_limit:  # NaN as well
        raise TrainingDiverged(
            f"the log-probabilities of trainer and engine differ by {drift:.3g} nats in the mean, more than "
            f"rollout.drift_limit={config.drift_limit:g}: the samples are not the policy's. Look at the precision of "
            "both, at the temperature, and at weight_sync/probe_difference; or raise the limit. " + tokens
        )
    if config.drift_warning is not None and drift > config.drift_warning:
        note(
            f"warning: trainer and engine differ by {drift:.3g} nats in the mean (rollout.drift_warning="
            f"{config.drift_warning:g}); algorithm.rollout_is=token_truncate corrects for it. {tokens}"
        )
