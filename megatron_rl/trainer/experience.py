"""Log-probabilities, values and returns of a batch of rollouts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rl.batching.batch import make_batch
from megatron_rl.batching.sequences import with_rows
from megatron_rl.config import RunConfig
from megatron_rl.distributed.collectives import gather_objects
from megatron_rl.mcore.critic import Critic
from megatron_rl.mcore.policy import Policy
from megatron_rl.trainer.models import Reference
from megatron_rl.types import ParallelContext, RolloutGroup, TrainBatch


def compute_old_logprobs(batch: TrainBatch, policy: Policy) -> TrainBatch:
    """Add the policy's own log-probabilities before the update (``old_logprobs``)."""
    return with_rows(batch, old_logprobs=policy.logprobs(batch, replay_routing=True))


def compute_ref_logprobs(batch: TrainBatch, reference: Reference) -> TrainBatch:
    """Add the reference model's log-probabilities (``ref_logprobs``)."""
    return with_rows(batch, ref_logprobs=reference.logprobs(batch))


def compute_values(
    batch: TrainBatch, critic: Critic, groups: Sequence[RolloutGroup], config: RunConfig, parallel: ParallelContext
) -> tuple[TrainBatch, TrainBatch]:
    """The policy's batch and the critic's, both with ``values``; collective.

    A critic with a layout of its own gets a batch of its own, made of the same groups for that layout.

    Args:
        batch: this rank's share in the policy's layout.
        groups: those that the batch was made of, the same on every rank.
        parallel: the policy's layout.
    """
    is_shared = critic.parallel is parallel
    critic_batch = batch if is_shared else make_batch(groups, config, critic.parallel)
    values = critic.values(critic_batch)
    critic_batch = with_rows(critic_batch, values=values)
    if is_shared:
        return critic_batch, critic_batch
    return with_rows(batch, values=redistribute(values, critic_batch, batch, critic.parallel)), critic_batch


def compute_returns(
    critic_batch: TrainBatch, batch: TrainBatch, critic: Critic, parallel: ParallelContext
) -> TrainBatch:
    """The critic's batch with the ``returns`` of the policy's batch; collective.

    Args:
        parallel: the policy's layout.
    """
    if critic.parallel is parallel:
        return batch
    returns = redistribute([sequence.returns for sequence in batch.sequences], batch, critic_batch, parallel)
    return with_rows(critic_batch, returns=returns)


def redistribute(
    rows: Sequence[Tensor], source: TrainBatch, target: TrainBatch, parallel: ParallelContext
) -> list[Tensor]:
    """Move per-token rows from one batch to another that has the same sequences on other ranks; collective.

    Args:
        rows: [L] for each sequence of ``source``.
        parallel: layout of ``source``.

    Returns:
        [L] for each sequence of ``target``; zeros for fillers.
    """
    own = {index: row for index, row in zip(source.global_index, rows, strict=True) if index >= 0}
    gathered = gather_objects(own if parallel.is_model_parallel_main else {}, parallel)
    row_of = {index: row for part in gathered for index, row in part.items()}
    return [
        row_of[index] if index >= 0 else torch.zeros(sequence.token_ids.numel())
        for index, sequence in zip(target.global_index, target.sequences, strict=True)
    ]
