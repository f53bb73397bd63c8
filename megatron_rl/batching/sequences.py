"""Rollout groups to training sequences, before anything is known about ranks."""

from collections.abc import Sequence

import torch

from megatron_rl.types import Rollout, RolloutGroup, TrainSequence


def to_sequence(rollout: Rollout) -> TrainSequence:
    """A training sequence whose advantages, weights and log-probabilities are still zero.

    A rollout whose reward failed keeps its tokens but loses its loss mask: it teaches nothing.
    """
    zeros = torch.zeros(rollout.token_ids.numel())
    mask = rollout.loss_mask if rollout.status == "ok" else torch.zeros_like(rollout.loss_mask)
    return TrainSequence(
        token_ids=rollout.token_ids,
        loss_mask=mask,
        rollout_logprobs=rollout.rollout_logprobs,
        advantages=zeros,
        loss_weights=zeros,
        old_logprobs=zeros,
        ref_logprobs=zeros,
        routing=rollout.routing,
    )


def flatten_groups(groups: Sequence[RolloutGroup]) -> tuple[list[Rollout], torch.Tensor, torch.Tensor]:
    """All rollouts in group order, their rewards [N] float32 and their groups [N] int64."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float32)
    indices = torch.tensor([group.index for group in groups for _ in group.rollouts], dtype=torch.int64)
    return rollouts, rewards, indices
