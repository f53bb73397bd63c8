"""Metrics of a step's rollouts and of the batch built from them."""

from collections.abc import Sequence

import torch

from megatron_rl.algorithms.advantages import count_zero_variance_groups
from megatron_rl.batching.sequences import flatten_groups
from megatron_rl.metrics.metric import Mean, Reduction, Sum, mean_max_min, mean_of
from megatron_rl.models import ModelSpec
from megatron_rl.models.flops import forward_flops
from megatron_rl.rollout.source import RolloutBatch
from megatron_rl.types import ParallelContext, RolloutGroup, TrainBatch, UpdatePlan


def rollout_metrics(
    rollouts: RolloutBatch, *, version: int, has_rewards: bool, parallel: ParallelContext
) -> dict[str, Reduction]:
    """Metrics of a step's rollouts, on the first rank; empty on the others, which hold the same rollouts.

    Args:
        version: version of the policy that is about to be updated.
    """
    if not parallel.is_main:
        return {}
    groups = rollouts.groups
    metrics: dict[str, Reduction] = {name: Mean(value) for name, value in rollouts.counts.items()}
    metrics |= length_metrics(groups)
    if has_rewards:
        _, rewards, group_of = flatten_groups(groups)
        metrics |= reward_metrics(groups, rewards, group_of)
        metrics |= staleness_metrics(groups, version)
    return metrics


def batch_metrics(batch: TrainBatch, spec: ModelSpec, parallel: ParallelContext) -> dict[str, Reduction]:
    """Cost and balance of the updates of a batch, on the first rank; empty on the others."""
    if not parallel.is_main:
        return {}
    return {
        "perf/actor_tflop": Mean(sum(update_flops(spec, update) for update in batch.updates) / 1e12),
        **mean_max_min("batch/imbalance", [update.imbalance for update in batch.updates]),
        "batch/num_micro_batches": Mean(sum(len(update.micro_batches) for update in batch.updates)),
    }


def update_flops(spec: ModelSpec, update: UpdatePlan) -> float:
    """FLOPs of an optimizer update over all ranks: the forward pass, and twice as many for the backward pass."""
    forward = forward_flops(
        spec,
        num_tokens=update.num_processed_tokens,
        sum_squared_lengths=update.sum_squared_lengths,
        num_logit_tokens=update.num_tokens,
    )
    return 3 * forward


def staleness_metrics(groups: Sequence[RolloutGroup], version: int) -> dict[str, Reduction]:
    """Number of versions by which the current policy is ahead of the one that sampled, over all sampled tokens.

    Args:
        version: version of the current policy.
    """
    sampled = [rollout.policy_versions[rollout.loss_mask] for group in groups for rollout in group.rollouts]
    return mean_max_min("rollout/staleness", (version - torch.cat(sampled)).float())


def length_metrics(groups: Sequence[RolloutGroup]) -> dict[str, Reduction]:
    """Prompt and response lengths in tokens, and the share of responses cut at the limit."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return {
        **mean_max_min("response_length", [float(rollout.loss_mask.sum()) for rollout in rollouts]),
        "response_length/clip_ratio": mean_of([rollout.finish_reason == "length" for rollout in rollouts]),
        **mean_max_min("prompt_length", [float(group.prompt.token_ids.numel()) for group in groups]),
        "perf/total_num_tokens": Sum(sum(rollout.token_ids.numel() for rollout in rollouts)),
    }


def reward_metrics(
    groups: Sequence[RolloutGroup], rewards: torch.Tensor, group_of: torch.Tensor
) -> dict[str, Reduction]:
    """Total rewards, rewards per function, failures, and groups with zero reward std.

    Args:
        rewards: [N] float32, NaN where the reward failed.
        group_of: [N] int64, group of each rollout.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    valid = rewards[~rewards.isnan()]
    metrics: dict[str, Reduction] = {
        **mean_max_min("critic/score", valid),
        **mean_max_min("critic/rewards", valid),
        "rollout/zero_std/count": Sum(count_zero_variance_groups(rewards, group_of)),
        "rollout/zero_std/fraction": Mean(count_zero_variance_groups(rewards, group_of), len(groups)),
    }
    for status in ("reward_error", "reward_timeout", "environment_error"):
        metrics[f"rollout/{status}/count"] = Sum(sum(rollout.status == status for rollout in rollouts))
    for name in sorted({name for rollout in rollouts for name in rollout.reward_parts}):
        values = [rollout.reward_parts[name] for rollout in rollouts if name in rollout.reward_parts]
        metrics[f"reward/{name}"] = mean_of(values)
    return metrics
