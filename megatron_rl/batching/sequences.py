"""Convert rollout groups to training sequences, independent of the layout of ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_rl.types import Rollout, RolloutGroup, TrainBatch, TrainSequence


def bare_sequence(token_ids: Tensor, loss_mask: Tensor) -> TrainSequence:
    """A sequence with tokens and mask only: advantages, log-probabilities and the like are 0, weights are 1.

    Args:
        token_ids: [L] int64.
        loss_mask: [L] bool.
    """
    zeros = torch.zeros(token_ids.numel())
    return TrainSequence(
        token_ids=token_ids,
        loss_mask=loss_mask,
        rollout_logprobs=zeros,
        advantages=zeros,
        loss_weights=loss_mask.float(),
        rollout_weights=torch.ones(token_ids.numel()),
        old_logprobs=zeros,
        ref_logprobs=zeros,
        rewards=zeros,
        values=zeros,
        returns=zeros,
    )


def to_sequence(rollout: Rollout) -> TrainSequence:
    """A training sequence with the tokens, routes, rewards and engine log-probabilities of a rollout.

    The other fields have the values of ``bare_sequence``. A rollout whose reward failed keeps its tokens but has no
    loss.
    """
    mask = rollout.loss_mask if rollout.status == "ok" else torch.zeros_like(rollout.loss_mask)
    bare = bare_sequence(rollout.token_ids, mask)
    return replace(
        bare,
        rollout_logprobs=rollout.rollout_logprobs,
        routing=rollout.routing,
        rewards=_laid_out(rewards_by_token(rollout), bare.rewards),
    )


def with_rows(batch: TrainBatch, **rows: Sequence[Tensor]) -> TrainBatch:
    """Return the batch with fields of its sequences replaced by ``rows``, one [L] tensor per field and sequence."""
    columns = zip(batch.sequences, *rows.values(), strict=True)
    sequences = [replace(sequence, **dict(zip(rows, values, strict=True))) for sequence, *values in columns]
    return replace(batch, sequences=sequences)


def rewards_by_token(rollout: Rollout) -> dict[int, float]:
    """Rewards by token index: step rewards at the end of their step, the rest at the last sampled token.

    Empty if the reward failed, and for demonstrations.
    """
    sampled = (rollout.policy_versions >= 0).nonzero()
    if rollout.status != "ok" or not sampled.numel():
        return {}
    rewards = dict(rollout.step_rewards)
    rest = rollout.reward - sum(rewards.values())
    if rest or not rewards:
        last = int(sampled.max())
        rewards[last] = rewards.get(last, 0.0) + rest
    return rewards


def _laid_out(rewards: Mapping[int, float], zeros: Tensor) -> Tensor:
    row = zeros.clone()
    for index, reward in rewards.items():
        row[index] = reward
    return row


def flatten_groups(groups: Sequence[RolloutGroup]) -> tuple[list[Rollout], torch.Tensor, torch.Tensor]:
    """All rollouts in group order, their rewards [N] float32 and their group indices [N] int64."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float32)
    indices = torch.tensor([group.index for group in groups for _ in group.rollouts], dtype=torch.int64)
    return rollouts, rewards, indices
