"""What a step's samples teach."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_rl.batching.batch import plan_batch
from megatron_rl.batching.selection import accepted, most_spread, without_truncated
from megatron_rl.batching.sequences import with_rows
from megatron_rl.config import RunConfig
from megatron_rl.config.algorithm import AlgorithmSection
from megatron_rl.distributed.collectives import gather_objects
from megatron_rl.mcore.critic import Critic
from megatron_rl.mcore.policy import Policy
from megatron_rl.metrics.timing import Stopwatch
from megatron_rl.trainer.models import Reference
from megatron_rl.types import ParallelContext, RolloutGroup, TrainBatch


def teaching(groups: Sequence[RolloutGroup], config: AlgorithmSection) -> Sequence[RolloutGroup]:
    """The groups that are to teach, in which only those responses have loss that are to."""
    if config.top_std_fraction < 1:
        groups = most_spread(groups, config.num_kept(len(groups)))
    if config.mask_truncated:
        groups = without_truncated(groups)
    if config.accept_min_reward is not None:
        groups = accepted(
            groups,
            min_reward=config.accept_min_reward,
            max_per_prompt=config.accept_max_per_prompt,
            unique=config.accept_unique,
        )
    return groups


def plan(groups: Sequence[RolloutGroup], config: RunConfig, parallel: ParallelContext) -> TrainBatch:
    """Share the sequences out over updates, data-parallel ranks and micro-batches."""
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
        # a step that brings nothing to imitate is no fault
        leave_out_empty=config.algorithm.accept_min_reward is not None,
    )


def score(
    batch: TrainBatch, policy: Policy, reference: Reference | None, watch: Stopwatch, *, needs_old: bool
) -> TrainBatch:
    """Add the trainer's own log-probabilities before the update, and the reference model's."""
    if needs_old:
        with watch.span("old_log_prob"):
            batch = with_rows(batch, old_logprobs=policy.logprobs(batch, replay_routing=True))
    if reference is not None:
        with watch.span("ref"):
            batch = with_rows(batch, ref_logprobs=reference.logprobs(batch))
    return batch


def value(
    batch: TrainBatch,
    groups: Sequence[RolloutGroup],
    critic: Critic | None,
    config: RunConfig,
    parallel: ParallelContext,
    watch: Stopwatch,
) -> tuple[TrainBatch, TrainBatch | None]:
    """The batch with the critic's values, and the critic's own share of it; None without a critic."""
    if critic is None:
        return batch, None
    with watch.span("values"):
        return add_values(batch, critic, parallel, lambda: plan(groups, config, critic.parallel))


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
    told = gather_objects(mine if parallel.is_model_parallel_main else {}, parallel)
    known = {index: row for part in told for index, row in part.items()}
    return [
        known[index] if index >= 0 else torch.zeros(sequence.token_ids.numel())
        for index, sequence in zip(target.global_index, target.sequences, strict=True)
    ]
