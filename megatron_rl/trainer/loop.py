"""The training loop. Every rank runs these same lines."""

from megatron_rl.algorithms.importance import build_correction, needs_old_logprobs
from megatron_rl.batching.batch import make_batch
from megatron_rl.batching.selection import num_trained_rollouts, select_groups
from megatron_rl.metrics.metric import Mean
from megatron_rl.rollout.source import RolloutBatch
from megatron_rl.trainer.advantages import compute_advantages, update_kl_coef
from megatron_rl.trainer.colocation import engine_awake, trainer_offloaded
from megatron_rl.trainer.context import Step, Trainer
from megatron_rl.trainer.experience import compute_old_logprobs, compute_ref_logprobs, compute_returns, compute_values
from megatron_rl.trainer.interruption import checkpoint_on_abort
from megatron_rl.trainer.metrics import batch_metrics, rollout_metrics
from megatron_rl.trainer.periodic import evaluate_if_due, reset_reference_if_due, save_if_due
from megatron_rl.trainer.rollout_correction import check_logprob_mismatch, correct_rollout
from megatron_rl.trainer.state import advance, count_updates
from megatron_rl.types import TrainState


def train(trainer: Trainer, state: TrainState) -> TrainState:
    """Run steps until the last one, or until a stop is requested.

    Returns:
        The state after the last step that was finished; if a stop was requested between steps, the caller saves it.

    Raises:
        Interrupted: a stop was requested while the engines were in use; a checkpoint has been saved.
        EngineDied: engines died too often; a checkpoint has been saved.
        TrainingDiverged: a loss or gradient is not finite, or trainer and engine log-probabilities differ too much.
        MegatronRLError: anything else that ends a run, on every rank.
    """
    if state.step == 0:
        state = finish_step(trainer, state, trainer.new_step(0))
    while state.step < trainer.config.run.num_steps and not trainer.stop.requested():
        state, step = train_step(trainer, state)
        state = finish_step(trainer, state, step)
    return state


def train_step(trainer: Trainer, state: TrainState) -> tuple[TrainState, Step]:
    """Generate, score, update."""
    with trainer.begin_step(state.step + 1) as step:  # timers, heartbeat; its body is what the profiler records
        rollouts = generate(trainer, state, step)
        if trainer.reward_model is not None:
            with step.timer("reward_model"):
                rollouts, metrics = trainer.reward_model.add_scores(rollouts)
                step.log(metrics)
        has_rewards = trainer.rollout_source.has_rewards
        step.log(rollout_metrics(rollouts, version=state.step, has_rewards=has_rewards, parallel=trainer.parallel))
        if not trainer.config.run.rollout_only:
            state = update(trainer, rollouts, state, step)
        trainer.memory.record("update")
        step.log(trainer.memory.metrics())
    trainer.log.rollouts(step.number, rollouts)
    if step.number == 1:
        trainer.log.note(trainer.memory.table())
    return advance(state, rollouts), step


def generate(trainer: Trainer, state: TrainState, step: Step) -> RolloutBatch:
    """Push the policy's weights to the engines and sample the groups of this step."""
    with checkpoint_on_abort(trainer, state):
        with step.timer("gen"):
            trainer.rollout_source.drain(version=state.step)  # an asynchronous round that is still running
        with trainer_offloaded(trainer, step):
            if trainer.rollout_source.uses_engine:
                with step.timer("update_weights"):
                    step.log(trainer.supervisor.push(version=state.step))
                trainer.memory.record("push")
            with step.timer("gen"), engine_awake(trainer):
                trainer.memory.record("generation")
                return trainer.rollout_source.collect(step.number, state.num_prompts_consumed)


def update(trainer: Trainer, rollouts: RolloutBatch, state: TrainState, step: Step) -> TrainState:
    """Update the critic and the policy from the rollouts of this step."""
    config, models, parallel = trainer.config, trainer.models, trainer.parallel
    policy, critic, reference = models.policy, models.critic, models.reference
    groups = select_groups(rollouts.groups, config.algorithm)
    step.log({"batch/num_trained_rollouts": Mean(num_trained_rollouts(groups))})
    batch = make_batch(groups, config, parallel)
    step.log(batch_metrics(batch, policy.spec, parallel))
    if not batch.updates:  # rejection sampling accepted nothing
        return state
    critic_batch = None
    if trainer.rollout_source.has_rewards:  # demonstrations need no advantages
        correction = build_correction(config.algorithm)
        if needs_old_logprobs(config.algorithm, correction, num_updates=len(batch.updates)):
            with step.timer("old_log_prob"):
                batch = compute_old_logprobs(batch, policy)
        if reference is not None:
            with step.timer("ref"):
                batch = compute_ref_logprobs(batch, reference)
        if critic is not None:
            with step.timer("values"):  # the critic may have a layout of its own, hence a batch of its own
                batch, critic_batch = compute_values(batch, critic, groups, config, parallel)
        with step.timer("adv"):
            batch, metrics = compute_advantages(batch, config.algorithm, parallel, state)
            step.log(metrics)
            batch, metrics = correct_rollout(batch, correction)
            step.log(metrics)
            state = update_kl_coef(state, batch, config.algorithm, parallel)
        if critic is not None and critic_batch is not None:
            with step.timer("update_critic"):
                step.log(critic.update(compute_returns(critic_batch, batch, critic, parallel)))
    if critic is None or state.step >= config.critic.warmup_steps:  # during its warm-up only the critic is trained
        with step.timer("update_actor"):
            metrics = policy.update(batch)
            step.log(metrics)
        state = count_updates(state, batch)
        if trainer.rollout_source.has_rewards:
            check_logprob_mismatch(metrics, config.rollout, parallel, trainer.log.note)
    return state


def finish_step(trainer: Trainer, state: TrainState, step: Step) -> TrainState:
    """Evaluate, reset the reference, save and log what is due after a step, including step 0."""
    evaluate_if_due(trainer, state, step)
    if state.step > 0:
        trainer.checkpoints.finish_if_written()  # a checkpoint that was written in the background
        state = reset_reference_if_due(trainer, state, step)
        save_if_due(trainer, state, step)
    trainer.log.step(state.step, step.metrics_with_timings() if state.step > 0 else step.metrics)
    return state
