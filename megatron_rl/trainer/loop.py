"""The training loop. Every rank executes these same lines."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_rl.algorithms.importance import build_correction, needs_old_logprobs
from megatron_rl.batching.selection import num_trained_rollouts
from megatron_rl.config import RunConfig
from megatron_rl.distributed.signals import StopRequest
from megatron_rl.errors import Interrupted
from megatron_rl.metrics.metric import Mean, Metrics, Reduction
from megatron_rl.metrics.timing import Stopwatch
from megatron_rl.trainer.advantages import adapt_kl, add_advantages, kl_reward_coef
from megatron_rl.trainer.colocation import awake, room_for_engine
from megatron_rl.trainer.context import Trainer
from megatron_rl.trainer.experience import add_returns, plan, score, teaching, value
from megatron_rl.trainer.memory_tracker import MemoryTracker
from megatron_rl.trainer.metrics import rollout_metrics, staleness_metrics
from megatron_rl.trainer.models import RunModels
from megatron_rl.trainer.periodic import conclude, refill_engine, saved_if_engines_die
from megatron_rl.trainer.profiler import profiled
from megatron_rl.trainer.rollout_correction import check_logprob_mismatch, correct_rollout
from megatron_rl.trainer.state import advance
from megatron_rl.types import ParallelContext, RolloutGroup, TrainBatch, TrainState


def train(
    course: Trainer,
    state: TrainState,
    unlogged: Metrics | None,
    parallel: ParallelContext,
    stop: StopRequest,
) -> bool:
    """Step after step until the last, or until somebody asks to stop; whether to start again, as of ``run``.

    Args:
        unlogged: what is known of the state's step, if a stop came before its metrics were complete.
    """
    config, log = course.config, course.log
    ledger = MemoryTracker(course.models, course.keeper.engine)
    num_carried = 0  # prompts of a step that was cut short
    try:
        if state.step == 0 or unlogged is not None:
            state, unlogged = conclude(course, state, unlogged or {}, Stopwatch(course.heartbeat.enter)), None
        elif state.step < config.run.num_steps and not stop.agreed():
            refill_engine(course, state)
        while state.step < config.run.num_steps and not stop.agreed():
            course.heartbeat.begin_step(state.step + 1)
            watch = Stopwatch(course.heartbeat.enter)
            state, metrics, is_learnt = take_step(course, ledger, state, watch, parallel)
            unlogged = metrics | ledger.metrics() | watch.metrics()
            state = conclude(course, state, metrics | ledger.metrics(), watch, is_learnt=is_learnt)
            unlogged = None
    except Interrupted as interruption:
        num_carried = interruption.num_prompts
        state = replace(state, num_prompts_consumed=state.num_prompts_consumed + num_carried)
    course.checkpoints.finish()
    if state.step < config.run.num_steps or unlogged is not None:
        in_flight = course.sampler.in_flight()
        path = course.checkpoints.save(state, course.models, in_flight, unlogged, again=num_carried > 0, exports=False)
        course.checkpoints.finish()
        log.note(f"stopped as asked after step {state.step}; saved {path}. Start the same command again to go on.")
        return stop.should_requeue()
    return False


def take_step(
    course: Trainer, ledger: MemoryTracker, state: TrainState, watch: Stopwatch, parallel: ParallelContext
) -> tuple[TrainState, dict[str, Reduction], bool]:
    """Sample and learn: the state after the step, what is known of it, and whether there was anything to learn."""
    config, models, sampler, keeper, log = course.config, course.models, course.sampler, course.keeper, course.log
    step = state.step + 1
    metrics: dict[str, Reduction] = {}
    with profiled(config.profiling, log.profile_folder, step, parallel):
        with saved_if_engines_die(course.checkpoints, state, models, sampler):
            with watch.span("gen"):
                sampler.drain(version=state.step)
            with room_for_engine(models, keeper.engine, config, watch):
                if sampler.uses_engine:
                    with watch.span("update_weights"):
                        metrics |= keeper.push(version=state.step)
                    ledger.record("push")
                with watch.span("gen"), awake(keeper.engine, config, parallel):
                    ledger.record("generation")
                    collected = sampler.collect(step, state.num_prompts_consumed)
        if course.judge is not None:
            with watch.span("reward_model"):
                collected, judged = course.judge(collected)
            metrics |= judged
        batch = None
        if not config.run.rollout_only:
            batch, state, learnt = learn(collected.groups, config, state, models, watch, graded=sampler.has_rewards)
            metrics |= learnt
        ledger.record("update")
        if sampler.has_rewards and batch is not None:
            check_logprob_mismatch(metrics, config.rollout, parallel, log.note)
    metrics |= rollout_metrics(collected, batch, models.policy.spec, graded=sampler.has_rewards, parallel=parallel)
    if sampler.has_rewards and parallel.is_main:
        metrics |= staleness_metrics(collected.groups, version=step - 1)
    log.collected(step, collected)
    if course.evaluator is None and sampler.has_rewards and step % config.metrics.log_every == 0:
        log.show(step, collected.groups[0])
    if step == 1:
        log.note(ledger.table())
    return advance(state, collected), metrics, batch is not None


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
    metrics: dict[str, Reduction] = {"batch/num_trained_rollouts": Mean(num_trained_rollouts(groups))}
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
        batch, corrected = correct_rollout(batch, correction)
        metrics |= credited | corrected
        if critic is not None and judged is not None:
            with watch.span("update_critic"):
                metrics |= critic.update(add_returns(judged, batch, critic, parallel))
    if critic is None or state.step >= config.critic.warmup_steps:
        with watch.span("update_actor"):
            metrics |= policy.update(batch)
        state = replace(state, num_updates=state.num_updates + len(batch.updates))
    return batch, state, metrics
