"""Split the sequences of a step into updates, data-parallel shares and micro-batches."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_rl.algorithms.loss_weights import Aggregation, sequence_loss_weights
from megatron_rl.batching.pack import balance, imbalance, micro_batches
from megatron_rl.batching.sequences import bare_sequence, flatten_groups, rewards_by_token, to_sequence
from megatron_rl.config import RunConfig
from megatron_rl.config.batching import BatchingSection
from megatron_rl.errors import DataError
from megatron_rl.types import ParallelContext, RolloutGroup, TrainBatch, TrainSequence, UpdatePlan

FILLER = -1


def make_batch(groups: Sequence[RolloutGroup], config: RunConfig, parallel: ParallelContext) -> TrainBatch:
    """This rank's share of a step's groups, split into updates and micro-batches for one layout.

    Args:
        groups: all groups of the step, the same on every rank and in the same order.
        parallel: layout of the model that reads the batch.

    Raises:
        DataError: an update has no token with loss.
    """
    # the context-parallel ranks share a micro-batch
    tokens = config.batching.max_tokens_per_micro_batch * parallel.cp_size
    return plan_batch(
        groups,
        replace(config.batching, max_tokens_per_micro_batch=tokens),
        dp_rank=parallel.dp_rank,
        dp_size=parallel.dp_size,
        aggregation=config.algorithm.aggregation,
        constant_length=config.algorithm.constant_length or config.rollout.max_new_tokens,
        # the interleaved schedule processes model chunks in rounds of one micro-batch per stage
        multiple_of=parallel.pp_size if parallel.vp_size > 1 else 1,
        # rejection sampling may accept nothing
        leave_out_empty=config.algorithm.accept_min_reward is not None,
    )


def plan_batch(
    groups: Sequence[RolloutGroup],
    config: BatchingSection,
    *,
    dp_rank: int,
    dp_size: int,
    aggregation: Aggregation,
    constant_length: int,
    multiple_of: int = 1,
    leave_out_empty: bool = False,
) -> TrainBatch:
    """This data-parallel rank's sequences and its updates, with the loss weights set.

    Args:
        groups: all groups of the step, the same on every rank and in the same order.
        multiple_of: the number of micro-batches of an update is a multiple of this.
        leave_out_empty: skip an update without a token with loss instead of raising.

    Raises:
        DataError: an update has no token with loss.
    """
    rollouts, rewards, group_of = flatten_groups(groups)
    sequences = [to_sequence(rollout) for rollout in rollouts]
    lengths = [sequence.token_ids.numel() for sequence in sequences]
    loss_lengths = torch.tensor([int(sequence.loss_mask.sum()) for sequence in sequences])

    own_sequences: list[TrainSequence] = []
    global_index: list[int] = []
    plans: list[UpdatePlan] = []
    per_update = len(sequences) // config.num_mini_batches
    for update in range(config.num_mini_batches):
        members = list(range(update * per_update, (update + 1) * per_update))
        weights = sequence_loss_weights(loss_lengths[members], aggregation, constant_length=constant_length)
        num_tokens = int(loss_lengths[members].sum())
        if num_tokens == 0 and leave_out_empty:
            continue
        if num_tokens == 0:
            raise DataError(
                f"update {update} of this step has {len(members)} sequences but no token with loss. "
                "Every reward failed, or every response is empty or truncated (algorithm.mask_truncated). Inspect the "
                "rollouts, or use more prompts or samples per step."
            )
        shares = balance([lengths[i] for i in members], dp_size)
        batches = micro_batches(
            [[members[i] for i in share] for share in shares],
            lengths,
            max_sequences=config.micro_batch_size,
            max_tokens=config.max_tokens_per_micro_batch,
            packed=config.packed,
            multiple_of=multiple_of,
        )
        own_micro_batches = []
        for batch in batches[dp_rank]:
            indices = []
            for index in batch or [FILLER]:
                if index == FILLER:
                    own_sequences.append(filler(sequences[members[0]]))
                else:
                    own_sequences.append(_with_weight(sequences[index], float(weights[index - members[0]])))
                indices.append(len(own_sequences) - 1)
                global_index.append(index)
            own_micro_batches.append(indices)
        plans.append(
            UpdatePlan(
                micro_batches=own_micro_batches,
                num_tokens=num_tokens,
                num_sequences=int((loss_lengths[members] > 0).sum()),
                num_processed_tokens=sum(lengths[i] for i in members),
                sum_squared_lengths=sum(lengths[i] ** 2 for i in members),
                imbalance=imbalance([sum(lengths[members[i]] for i in share) for share in shares]),
            )
        )
    return TrainBatch(
        sequences=own_sequences,
        updates=plans * config.num_epochs,
        global_index=global_index,
        rewards=rewards,
        groups=group_of,
        baselines=torch.tensor([group.baseline for group in groups for _ in group.rollouts]),
        step_rewards=[rewards_by_token(rollout) for rollout in rollouts],
    )


def given_batch(
    sequences: Sequence[TrainSequence], micro_batches: Sequence[Sequence[int]], *, num_updates: int = 1
) -> TrainBatch:
    """A batch of the given micro-batches, without planning, for one data-parallel rank.

    Args:
        micro_batches: indices into ``sequences``.
        num_updates: number of times that the same update is repeated.
    """
    lengths = [sequence.token_ids.numel() for sequence in sequences]
    loss_lengths = [int(sequence.loss_mask.sum()) for sequence in sequences]
    plan = UpdatePlan(
        micro_batches=micro_batches,
        num_tokens=sum(loss_lengths),
        num_sequences=sum(length > 0 for length in loss_lengths),
        num_processed_tokens=sum(lengths),
        sum_squared_lengths=sum(length**2 for length in lengths),
        imbalance=1.0,
    )
    nothing = torch.zeros(len(sequences))
    return TrainBatch(
        sequences=sequences,
        updates=[plan] * num_updates,
        global_index=list(range(len(sequences))),
        rewards=nothing,
        groups=nothing.long(),
        baselines=nothing,
        step_rewards=[{}] * len(sequences),
    )


def _with_weight(sequence: TrainSequence, weight: float) -> TrainSequence:
    return replace(sequence, loss_weights=sequence.loss_mask * weight)


def filler(sequence: TrainSequence) -> TrainSequence:
    """The first two tokens of a sequence, without loss, to fill an empty micro-batch."""
    bare = bare_sequence(sequence.token_ids[:2], torch.zeros(2, dtype=torch.bool))
    return replace(bare, routing=None if sequence.routing is None else sequence.routing[:2])
