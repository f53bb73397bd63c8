"""Split the sequences of a step into updates, data-parallel shares and micro-batches."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_rl.algorithms.loss_weights import Aggregation, sequence_loss_weights
from megatron_rl.batching.pack import balance, imbalance, micro_batches
from megatron_rl.batching.sequences import bare_sequence, earned, flatten_groups, to_sequence
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
        # the interleaved schedule visits chunks in rounds of one micro-batch for each stage
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
        multiple_of: what the number of micro-batches must divide by.
        leave_out_empty: an update without a token with loss is not made, and not an error.

    Raises:
        DataError: an update has no token with loss.
    """
    rollouts, rewards, group_of = flatten_groups(groups)
    sequences = [to_sequence(rollout) for rollout in rollouts]
    lengths = [sequence.token_ids.numel() for sequence in sequences]
    loss_lengths = torch.tensor([int(sequence.loss_mask.sum()) for sequence in sequences])

    chosen: list[TrainSequence] = []
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
                f"update {update} of this step has {len(members)} sequences but no token to learn from. "
                "Every reward failed, or every response is empty or was cut (algorithm.mask_truncated); look at the "
                "rollouts, or take more prompts or samples a step."
            )
        bins = balance([lengths[i] for i in members], dp_size)
        batches = micro_batches(
            [[members[i] for i in one] for one in bins],
            lengths,
            max_sequences=config.micro_batch_size,
            max_tokens=config.max_tokens_per_micro_batch,
            packed=config.packed,
            multiple_of=multiple_of,
        )
        mine = []
        for batch in batches[dp_rank]:
            places = []
            for index in batch or [FILLER]:
                if index == FILLER:
                    chosen.append(filler(sequences[members[0]]))
                else:
                    chosen.append(_with_weight(sequences[index], float(weights[index - members[0]])))
                places.append(len(chosen) - 1)
                global_index.append(index)
            mine.append(places)
        plans.append(
            UpdatePlan(
                micro_batches=mine,
                num_tokens=num_tokens,
                num_sequences=int((loss_lengths[members] > 0).sum()),
                num_processed_tokens=sum(lengths[i] for i in members),
                sum_squared_lengths=sum(lengths[i] ** 2 for i in members),
                imbalance=imbalance([sum(lengths[members[i]] for i in one) for one in bins]),
            )
        )
    return TrainBatch(
        sequences=chosen,
        updates=plans * config.num_epochs,
        global_index=global_index,
        rewards=rewards,
        groups=group_of,
        baselines=torch.tensor([group.baseline for group in groups for _ in group.rollouts]),
        step_rewards=[earned(rollout) for rollout in rollouts],
    )


def given_batch(
    sequences: Sequence[TrainSequence], micro_batches: Sequence[Sequence[int]], *, num_updates: int = 1
) -> TrainBatch:
    """Sequences that need no planning, in given micro-batches on one data-parallel rank.

    Args:
        micro_batches: places in ``sequences``.
        num_updates: how often the same update is made.
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
    """A short copy without loss, for a rank that has no sequence left."""
    bare = bare_sequence(sequence.token_ids[:2], torch.zeros(2, dtype=torch.bool))
    return replace(bare, routing=None if sequence.routing is None else sequence.routing[:2])
