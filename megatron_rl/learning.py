"""What a step's samples teach."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_rl.algorithms.importance import build_correction, needs_old_logprobs
from megatron_rl.algorithms.kl import adapted_coef
from megatron_rl.batching.plan import plan_batch
from megatron_rl.batching.selection import accepted, most_spread, num_teaching, without_truncated
from megatron_rl.batching.sequences import with_rows
from megatron_rl.config import RunConfig
from megatron_rl.config.algorithm import AlgorithmSection
from megatron_rl.correction import correct
from megatron_rl.credit import add_advantages, kl_of_responses
from megatron_rl.mcore.critic import Critic
from megatron_rl.mcore.policy import Policy
from megatron_rl.metrics.metric import Mean, Reduction
from megatron_rl.metrics.timing import Stopwatch
from megatron_rl.run_models import Reference, RunModels
from megatron_rl.types import ParallelContext, RolloutGroup, TrainBatch, TrainState
from megatron_rl.valuation import add_returns, add_values


def learn(
    groups: Sequence[RolloutGroup],
    config: RunConfig,
    state: TrainState,
    models: RunModels,
    watch: Stopwatch,
    *,
    graded: bool,
) -> tuple[TrainBatch, TrainState, dict[str, Reduction]]:
    """Update the models from the groups of a step.

    Args:
        groups: of the step, the same on every rank.
        state: after the step before.
        graded: the groups have rewards; otherwise they are imitated.

    Returns:
        this rank's batch, the state with what the step has adapted, and metrics.
    """
    policy, critic, parallel = models.policy, models.critic, models.policy.parallel
    groups = teaching(groups, config.algorithm)
    metrics: dict[str, Reduction] = {"batch/num_teaching": Mean(num_teaching(groups))}
    batch = plan(groups, config, parallel)
    if not batch.updates:
        return batch, state, metrics
    if graded:
        correction = build_correction(config.algorithm)
        needs_old = needs_old_logprobs(config.algorithm, correction, num_updates=len(batch.updates))
        batch = score(batch, policy, models.reference, watch, needs_old=needs_old)
        batch, judged = value(batch, groups, critic, config, parallel, watch)
        coef = kl_reward_coef(state, config.algorithm)
        batch, credited = add_advantages(batch, config.algorithm, parallel, kl_coef=coef)
        state = adapt_kl(state, batch, config.algorithm, parallel, coef)
        batch, corrected = correct(batch, correction)
        metrics |= credited | corrected
        if critic is not None and judged is not None:
            with watch.span("update_critic"):
                metrics |= critic.update(add_returns(judged, batch, critic, parallel))
    if critic is None or state.step >= config.critic.warmup_steps:
        with watch.span("update_actor"):
            metrics |= policy.update(batch)
        state = replace(state, num_updates=state.num_updates + len(batch.updates))
    return batch, state, metrics


def teaching(groups: Sequence[RolloutGroup], config: AlgorithmSection) -> Sequence[RolloutGroup]:
    """The groups that are to teach, in which only those responses have loss that are to."""
    if config.keep_most_spread < 1:
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


def kl_reward_coef(state: TrainState, config: AlgorithmSection) -> float:
    """Weight of the KL penalty in the reward as it is now."""
    return config.kl_reward_coef if state.kl_reward_coef is None else state.kl_reward_coef


def adapt_kl(
    state: TrainState, batch: TrainBatch, config: AlgorithmSection, parallel: ParallelContext, coef: float
) -> TrainState:
    """The state with the weight of that penalty for the next step."""
    if config.kl_reward_target is None:
        return state
    kl, count = kl_of_responses(batch.sequences, parallel)
    return replace(
        state, kl_reward_coef=adapted_coef(coef, kl, config.kl_reward_target, count, config.kl_reward_horizon)
    )
