"""What is measured of a step's rollouts and of the update that they were made into."""

from megatron_rl.batching.sequences import flatten_groups
from megatron_rl.metrics.metric import Mean, Reduction, mean_max_min
from megatron_rl.models import ModelSpec
from megatron_rl.models.flops import forward_flops
from megatron_rl.rollout.sampler import Collected
from megatron_rl.rollout.statistics import length_metrics, reward_metrics
from megatron_rl.types import ParallelContext, TrainBatch, UpdatePlan


def rollout_metrics(
    collected: Collected, batch: TrainBatch | None, spec: ModelSpec, *, graded: bool, parallel: ParallelContext
) -> dict[str, Reduction]:
    """Metrics of the step's rollouts, which every rank knows and the first one counts."""
    groups = collected.groups
    metrics: dict[str, Reduction] = {name: Mean(value) for name, value in collected.counts.items()}
    if not parallel.is_main:
        return {}
    metrics |= length_metrics(groups)
    if batch is not None:
        metrics["perf/actor_tflop"] = Mean(sum(update_flops(spec, update) for update in batch.updates) / 1e12)
        metrics |= mean_max_min("batch/imbalance", [update.imbalance for update in batch.updates])
        metrics["batch/num_micro_batches"] = Mean(sum(len(update.micro_batches) for update in batch.updates))
    if graded:
        _, rewards, group_of = flatten_groups(groups)
        metrics |= reward_metrics(groups, rewards, group_of)
    return metrics


def update_flops(spec: ModelSpec, update: UpdatePlan) -> float:
    """Operations of an optimizer update over all ranks: forward, and twice as many backward."""
    forward = forward_flops(
        spec,
        num_tokens=update.num_processed_tokens,
        sum_squared_lengths=update.sum_squared_lengths,
        num_logit_tokens=update.num_tokens,
    )
    return 3 * forward
