"""Lifecycle of a run: join the world, build, restore, train, stop."""

from contextlib import closing

from megatron_rl.checkpointing.manager import CheckpointManager
from megatron_rl.config import RunConfig, validate
from megatron_rl.distributed.collectives import raise_together
from megatron_rl.distributed.heartbeat import Heartbeat, seconds_until_stuck
from megatron_rl.distributed.signals import StopRequest
from megatron_rl.mcore.runtime.parallel import describe_layout, init_parallel, launcher_world, leave_world
from megatron_rl.metrics.timing import Stopwatch
from megatron_rl.planning.this_machine import plan_on_this_machine
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
from megatron_rl.trainer.colocation import room_for_engine
from megatron_rl.trainer.context import Trainer
from megatron_rl.trainer.logger import RunLogger, build_log, device_peak
from megatron_rl.trainer.loop import train
from megatron_rl.trainer.periodic import load_reference
from megatron_rl.trainer.preflight import Inputs, read_inputs
from megatron_rl.trainer.state import fresh_state
from megatron_rl.types import ParallelContext


def run(config: RunConfig, resume: str) -> bool:
    """Train by reinforcement or on demonstrations, from the beginning or a checkpoint.

    Args:
        resume: "auto", "never" or the path of a checkpoint.

    Returns:
        whether a scheduler has interrupted it, so that it is to be started again.

    Raises:
        MegatronRLError: on every rank; what is wrong and what to change.
    """
    _, world_size, _ = launcher_world()
    validate(config, world_size)
    try:
        return run_in(config, resume, init_parallel(config.parallel))
    finally:
        leave_world()


def run_in(config: RunConfig, resume: str, parallel: ParallelContext) -> bool:
    """``run`` in a world that is joined already."""
    # so early that what is asked while models are built is heard
    stop = StopRequest(parallel, before_end_s=config.run.stop_margin_s)
    with closing(Heartbeat(parallel, stuck_s=seconds_until_stuck(config))) as heartbeat:
        return prepare_and_train(config, resume, parallel, stop, heartbeat)


def prepare_and_train(
    config: RunConfig, resume: str, parallel: ParallelContext, stop: StopRequest, heartbeat: Heartbeat
) -> bool:
    """``run`` with somebody who listens and somebody who watches."""
    inputs = read_inputs(config, parallel)
    folder = RunFolder(config.run.output_dir)
    with raise_together(parallel):
        folder.check_writable()
    planned = plan_on_this_machine(config, parallel)
    checkpoints = CheckpointManager(folder, config, parallel)
    checkpoint, damages = checkpoints.find(resume)

    heartbeat.enter("build models")
    models = build_models(config, parallel)
    policy = models.policy

    def is_interrupted() -> bool:
        heartbeat.progress()  # an engine that asks is at work
        return stop.is_known()

    heartbeat.enter("start the engine")
    with room_for_engine(models, None, config, Stopwatch()):
        engine = build_engine(config, policy, inputs.suite, is_interrupted)
        if config.rollout.sleep_engine:
            with raise_together(parallel):
                engine.sleep()
    heartbeat.enter("restore")
    state = checkpoints.restore(checkpoint, models) if checkpoint else fresh_state(parallel)
    load_reference(models.reference, checkpoints.reference_of(state), parallel)
    keeper = build_supervisor(config, engine, policy)
    with raise_together(parallel):
        collector = build_collector(config, inputs, keeper, policy)
    with closing(engine), closing(collector):
        with raise_together(parallel):
            sampler = build_rollout_source(config, inputs, collector, parallel)
            sampler.resume(checkpoints.in_flight(checkpoint) if checkpoint else ())
            unlogged = checkpoints.unlogged(checkpoint) if checkpoint else None
        evaluator = build_validator(config, inputs, collector)
        with raise_together(parallel):
            if parallel.is_main:
                folder.create(config)
            console, sinks = build_log(config, folder, state, parallel, unlogged=unlogged is not None)
        with closing(
            RunLogger(
                console,
                sinks,
                folder,
                parallel,
                device_peak(config, parallel),
                keep_rollouts_every=config.metrics.keep_rollouts_every,
            )
        ) as log:
            log.note(
                "\n".join(
                    [*damages, planned, describe(config, inputs, parallel, checkpoint.name if checkpoint else None)]
                )
            )
            judge = build_reward_model_scorer(config, inputs, models)
            examiner = build_benchmark_evaluator(config, inputs, keeper, policy, log.note)
            course = Trainer(config, models, sampler, judge, evaluator, examiner, keeper, checkpoints, log, heartbeat)
            return train(course, state, unlogged, parallel, stop)


def describe(config: RunConfig, inputs: Inputs, parallel: ParallelContext, resumed: str | None) -> str:
    """What is about to happen, in a few lines."""
    rollout, batching = config.rollout, config.batching
    group = rollout.group_size if rollout.source != "demonstrations" else 1
    sequences = rollout.num_prompts_per_step * group
    lines = [
        f"{config.run.name}: {config.model.path} in {config.model.dtype}, "
        f"{describe_layout(parallel)} on {parallel.device.type}, "
        f"{config.run.num_steps} steps" + (f", resumed from {resumed}" if resumed else ""),
        f"each step: {rollout.num_prompts_per_step} prompts x {group} = {sequences} sequences; mini-batches of "
        f"{sequences // batching.num_mini_batches} sequences; "
        f"{batching.num_mini_batches * batching.num_epochs} optimizer updates",
    ]
    held_out = inputs.validation.num_overlong if inputs.validation else 0
    if inputs.train.num_overlong or held_out:
        lines.append(
            f"dropped as longer than data.max_prompt_tokens={config.data.max_prompt_tokens}: "
            f"{inputs.train.num_overlong} training prompts, {held_out} held-out prompts"
        )
    return "\n".join(lines)
