"""Lifecycle of a run: join the world, build, restore, train, stop."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

from megatron_rl.checkpointing.manager import CheckpointManager
from megatron_rl.config import RunConfig, validate
from megatron_rl.config.validate import sequences_per_step
from megatron_rl.distributed.collectives import raise_together
from megatron_rl.distributed.heartbeat import Heartbeat, seconds_until_stuck
from megatron_rl.distributed.signals import StopRequest
from megatron_rl.errors import Interrupted
from megatron_rl.mcore.runtime.parallel import describe_layout, joined_world, launcher_world
from megatron_rl.metrics.metric import Metrics
from megatron_rl.metrics.timing import Stopwatch
from megatron_rl.planning.this_machine import plan_on_this_machine
from megatron_rl.rollout.engines.base import Engine
from megatron_rl.run_folder import RunFolder
from megatron_rl.trainer.build import (
    build_benchmark_evaluator,
    build_collector,
    build_engine,
    build_models,
    build_reward_model_scorer,
    build_rollout_source,
    build_supervisor,
    build_validator,
)
from megatron_rl.trainer.colocation import models_offloaded, policy_in_engine
from megatron_rl.trainer.context import Trainer
from megatron_rl.trainer.inputs import Inputs, read_inputs
from megatron_rl.trainer.interruption import checkpoint_on_abort, save_on_stop
from megatron_rl.trainer.logger import RunLogger, build_log, device_peak
from megatron_rl.trainer.loop import finish_step, train
from megatron_rl.trainer.memory_tracker import MemoryTracker
from megatron_rl.trainer.models import RunModels, load_reference
from megatron_rl.trainer.periodic import (
    are_benchmarks_due,
    is_validation_due,
)
from megatron_rl.trainer.state import initial_state
from megatron_rl.types import ParallelContext, TrainState


def run(config: RunConfig, resume: str) -> bool:
    """Train by reinforcement learning or on demonstrations, from the beginning or from a checkpoint.

    Args:
        resume: "auto", "never" or the path of a checkpoint.

    Returns:
        Whether a scheduler has interrupted the run, so that it should be requeued.

    Raises:
        MegatronRLError: on every rank; what is wrong and what to change.
    """
    _, world_size, _ = launcher_world()
    validate(config, world_size)
    with joined_world(config.parallel) as parallel:
        return run_in_world(config, resume, parallel)


def run_in_world(config: RunConfig, resume: str, parallel: ParallelContext) -> bool:
    """``run`` for a rank that has joined the world already."""
    stop = StopRequest(parallel, before_end_s=config.run.stop_margin_s)  # first: gets signals while models are built
    with (
        closing(Heartbeat(parallel, stuck_s=seconds_until_stuck(config))) as heartbeat,
        open_trainer(config, resume, parallel, stop, heartbeat) as (trainer, state, unlogged),
    ):
        try:
            state = train(trainer, resume_step(trainer, state, unlogged))
        except Interrupted as interruption:
            if not interruption.is_saved:
                raise AssertionError("the engines were used outside of checkpoint_on_abort") from interruption
            return stop.should_requeue()
        trainer.checkpoints.finish()
        if state.step < config.run.num_steps:
            save_on_stop(trainer, state)
            return stop.should_requeue()
        return False


def resume_step(trainer: Trainer, state: TrainState, unlogged: Metrics | None) -> TrainState:
    """Finish the state's step if a stop has interrupted its evaluation, else repeat that evaluation's weight push."""
    if state.step and unlogged is not None:
        return finish_step(trainer, state, trainer.new_step(state.step, unlogged))
    if 0 < state.step < trainer.config.run.num_steps and not trainer.stop.requested():
        push_as_before_stop(trainer, state)
    return state


def push_as_before_stop(trainer: Trainer, state: TrainState) -> None:
    """Push the weights that an evaluation had pushed before the stop, so that metrics stay bit-equal.

    The metrics of such a push belong to the step that was evaluated, which has been logged, and not to the next.
    """
    was_pushed = (trainer.validator is not None and is_validation_due(trainer, state.step)) or (
        trainer.benchmarks is not None and are_benchmarks_due(trainer, state.step)
    )
    if trainer.rollout_source.uses_engine and was_pushed:
        step = trainer.new_step(state.step)
        with (
            checkpoint_on_abort(trainer, state),
            step.timer("update_weights"),
            policy_in_engine(trainer, state, step),
        ):
            pass


@contextmanager
def open_trainer(
    config: RunConfig, resume: str, parallel: ParallelContext, stop: StopRequest, heartbeat: Heartbeat
) -> Iterator[tuple[Trainer, TrainState, Metrics | None]]:
    """Build a run and restore its checkpoint; closes engine, reward workers and log at the end.

    Yields:
        The trainer, the state to continue from, and the metrics of the state's step if a stop came before they were
        logged.
    """
    inputs = read_inputs(config, parallel)
    folder = RunFolder(config.run.output_dir)
    with raise_together(parallel):
        folder.check_writable()
    plan = plan_on_this_machine(config, parallel)
    checkpoints = CheckpointManager(folder, config, parallel)
    checkpoint, damages = checkpoints.find(resume)

    heartbeat.enter("build models")
    models = build_models(config, parallel)
    heartbeat.enter("start the engine")
    engine = start_colocated_engine(config, inputs, models, stop, heartbeat)
    heartbeat.enter("restore")
    state = checkpoints.restore(checkpoint, models) if checkpoint else initial_state(parallel)
    load_reference(models.reference, checkpoints.references.path_of(state), parallel)
    supervisor = build_supervisor(config, engine, models.policy)
    with raise_together(parallel):
        collector = build_collector(config, inputs, supervisor, models.policy)
    with closing(engine), closing(collector):
        with raise_together(parallel):
            rollout_source = build_rollout_source(config, inputs, collector, parallel)
            rollout_source.resume(checkpoints.in_flight(checkpoint) if checkpoint else ())
            unlogged = checkpoints.unlogged(checkpoint) if checkpoint else None
        validator = build_validator(config, inputs, collector)
        with raise_together(parallel):
            if parallel.is_main:
                folder.create(config)
            console, sinks = build_log(config, folder, state, parallel, unlogged=unlogged is not None)
        logger = RunLogger(
            console,
            sinks,
            folder,
            parallel,
            device_peak(config, parallel),
            keep_rollouts_every=config.metrics.keep_rollouts_every,
            # without validation there are no held-out samples to show
            show_rollout_every=config.metrics.log_every if validator is None and rollout_source.has_rewards else 0,
        )
        with closing(logger) as log:
            resumed = checkpoint.name if checkpoint else None
            log.note("\n".join([*damages, plan, describe(config, inputs, parallel, resumed)]))
            trainer = Trainer(
                config=config,
                models=models,
                supervisor=supervisor,
                rollout_source=rollout_source,
                reward_model=build_reward_model_scorer(config, inputs, models),
                validator=validator,
                benchmarks=build_benchmark_evaluator(config, inputs, supervisor, models.policy, log.note),
                checkpoints=checkpoints,
                log=log,
                memory=MemoryTracker(models, engine),
                heartbeat=heartbeat,
                stop=stop,
            )
            yield trainer, state, unlogged


def start_colocated_engine(
    config: RunConfig, inputs: Inputs, models: RunModels, stop: StopRequest, heartbeat: Heartbeat
) -> Engine:
    """Start this rank's engine in the memory that the offloaded trainer leaves free; collective."""

    def is_interrupted() -> bool:
        heartbeat.progress()  # an engine that polls is working
        return stop.poll()

    with models_offloaded(models, config, Stopwatch().span):
        engine = build_engine(config, models.policy, inputs.benchmarks, is_interrupted)
        if config.rollout.sleep_engine:
            with raise_together(models.policy.parallel):
                engine.sleep()
    return engine


def describe(config: RunConfig, inputs: Inputs, parallel: ParallelContext, resumed: str | None) -> str:
    """Summary of the run for the console, in a few lines."""
    rollout, batching = config.rollout, config.batching
    group = rollout.group_size if rollout.source != "demonstrations" else 1
    sampled, trained = rollout.num_prompts_per_step * group, sequences_per_step(config)
    selected = "" if trained == sampled else f", {trained} of them trained on"
    lines = [
        f"{config.run.name}: {config.model.path} in {config.model.dtype}, "
        f"{describe_layout(parallel)} on {parallel.device.type}, "
        f"{config.run.num_steps} steps" + (f", resumed from {resumed}" if resumed else ""),
        f"each step: {rollout.num_prompts_per_step} prompts x {group} = {sampled} sequences{selected}; mini-batches of "
        f"{trained // batching.num_mini_batches} sequences; "
        f"{batching.num_mini_batches * batching.num_epochs} optimizer updates",
    ]
    held_out = inputs.validation.num_overlong if inputs.validation else 0
    if inputs.train.num_overlong or held_out:
        lines.append(
            f"dropped as longer than data.max_prompt_tokens={config.data.max_prompt_tokens}: "
            f"{inputs.train.num_overlong} training prompts, {held_out} held-out prompts"
        )
    return "\n".join(lines)
