"""What the critic makes of a batch, between its own layout and the policy's."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_rl.batching.sequences import with_rows
from megatron_rl.collective import gather_objects
from megatron_rl.mcore.critic import Critic
from megatron_rl.types import ParallelContext, TrainBatch


def add_values(
    batch: TrainBatch, critic: Critic, parallel: ParallelContext, plan: Callable[[], TrainBatch]
) -> tuple[TrainBatch, TrainBatch]:
    """The policy's batch and the critic's, both with values; collective.

    Args:
        parallel: the policy's layout.
        plan: shares the same sequences out over the critic's layout; not asked where that is the policy's.
    """
    shared = critic.parallel is parallel
    theirs = batch if shared else plan()
    values = critic.values(theirs)
    theirs = with_rows(theirs, values=values)
    if shared:
        return theirs, theirs
    return with_rows(batch, values=handed_over(values, theirs, batch, critic.parallel)), theirs


def add_returns(theirs: TrainBatch, batch: TrainBatch, critic: Critic, parallel: ParallelContext) -> TrainBatch:
    """The critic's batch with the returns of the policy's; collective."""
    if critic.parallel is parallel:
        return batch
    returns = handed_over([sequence.returns for sequence in batch.sequences], batch, theirs, parallel)
    return with_rows(theirs, returns=returns)


def handed_over(
    rows: Sequence[Tensor], source: TrainBatch, target: TrainBatch, parallel: ParallelContext
) -> list[Tensor]:
    """Rows of one batch's sequences for those of another one, which has the same sequences on other ranks; collective.

    Args:
        parallel: layout of the first batch.
    """
    mine = {index: row for index, row in zip(source.global_index, rows, strict=True) if index >= 0}
    told = gather_objects(mine if parallel.speaks_for_sequences else {}, parallel)
    known = {index: row for part in told for index, row in part.items()}
    return [
        known[index] if index >= 0 else torch.zeros(sequence.token_ids.numel())
        for index, sequence in zip(target.global_index, target.sequences, strict=True)
    ]
