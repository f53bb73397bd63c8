"""What happens every few steps: evaluation, benchmarks, reference resets, checkpoints."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_rl.distributed.collectives import raise_together
from megatron_rl.errors import EngineDied, Interrupted
from megatron_rl.evaluation.validation import Sample, Validator
from megatron_rl.mcore.reference import AdapterFreeReference
from megatron_rl.metrics.metric import Metrics
from megatron_rl.trainer.colocation import policy_in_engine
from megatron_rl.trainer.context import Step, Trainer
from megatron_rl.trainer.models import Reference
from megatron_rl.trainer.state import consume, is_due
from megatron_rl.types import ParallelContext, TrainState


def evaluate_if_due(trainer: Trainer, state: TrainState, step: Step) -> None:
    """Run validation and benchmarks if they are due after this step (including step 0)."""
    samples: Sequence[Sample] = []
    with checkpoint_if_stopped(trainer, state, step.metrics_with_timings() if state.step else None):
        if trainer.validator is not None and is_validation_due(trainer, state.step):
            samples = validate(trainer, trainer.validator, state, step)
        if trainer.benchmarks is not None and are_benchmarks_due(trainer, state.step):
            with step.timer("benchmarks"), policy_in_engine(trainer, state, step):
                step.log(trainer.benchmarks.evaluate(state.step))
    trainer.log.samples(samples)  # last: logged once even if interrupted benchmarks repeat all of it


def validate(trainer: Trainer, validator: Validator, state: TrainState, step: Step) -> Sequence[Sample]:
    """Generate and grade the held-out prompts; return a few samples."""
    with step.timer("testing"), policy_in_engine(trainer, state, step) as pushed:
        metrics, samples = validator.validate(state.step)
    step.merge(pushed | metrics)
    headline = [f"{name.removeprefix('val/')} {metrics[name].result():.4g}" for name in validator.headline]
    trainer.log.note(f"held out, step {state.step}: {', '.join(headline)}")
    return samples


def is_validation_due(trainer: Trainer, step: int) -> bool:
    """Whether ``data.validation`` is evaluated after this step."""
    return step == 0 or is_due(trainer.config.validation.every, step, trainer.config.run.num_steps)


def are_benchmarks_due(trainer: Trainer, step: int) -> bool:
    """Whether ``benchmarks.suite`` runs after this step."""
    return step == 0 or is_due(trainer.config.benchmarks.every, step, trainer.config.run.num_steps)


def reset_reference_if_due(trainer: Trainer, state: TrainState, step: Step) -> TrainState:
    """Make the current policy the reference every ``algorithm.reference_reset_every`` steps."""
    every = trainer.config.algorithm.reference_reset_every
    if not every or state.step % every:
        return state
    with step.timer("reset_reference"):
        state = trainer.checkpoints.references.keep(state, trainer.models.policy)
        load_reference(trainer.models.reference, trainer.checkpoints.references.path_of(state), trainer.parallel)
    return state


def load_reference(reference: Reference | None, path: str | None, parallel: ParallelContext) -> None:
    """Load the weights of an earlier policy into the reference, if the run has replaced it."""
    if reference is not None and path is not None:
        assert not isinstance(reference, AdapterFreeReference), "validate rejects resets of this reference"
        with raise_together(parallel):
            reference.load(path)


def save_if_due(trainer: Trainer, state: TrainState, step: Step) -> None:
    """Save a checkpoint every ``checkpoint.every`` steps and after the last, except in rollout-only runs."""
    run = trainer.config.run
    trainer.checkpoints.finish_if_written()  # a checkpoint that was written in the background
    if not run.rollout_only and is_due(trainer.config.checkpoint.every, state.step, run.num_steps):
        with step.timer("save_checkpoint"):
            trainer.checkpoints.save(state, trainer.models, trainer.rollouts.in_flight())


@contextmanager
def checkpoint_if_stopped(trainer: Trainer, state: TrainState, unlogged: Metrics | None = None) -> Iterator[None]:
    """Save a checkpoint of ``state`` if the body is interrupted or its engines die too often.

    Args:
        unlogged: metrics of the state's step that have not been logged yet; None if they have.

    Raises:
        Interrupted, EngineDied: as the body does, after the checkpoint is complete.
    """
    try:
        yield
    except EngineDied:
        save_and_finish(trainer, state, unlogged)
        raise
    except Interrupted as interruption:
        num_prompts = interruption.num_prompts  # of a step that was cut short, whose samples are carried over
        save_on_stop(trainer, consume(state, num_prompts), unlogged, again=num_prompts > 0)
        raise


def save_on_stop(trainer: Trainer, state: TrainState, unlogged: Metrics | None = None, *, again: bool = False) -> None:
    """Save without exports, as time is short, and tell the user how to continue."""
    path = save_and_finish(trainer, state, unlogged, again=again)
    trainer.log.note(
        f"stopped on request after step {state.step}; saved {path}. Start the same command again to continue."
    )


def save_and_finish(trainer: Trainer, state: TrainState, unlogged: Metrics | None, *, again: bool = False) -> str:
    """Save without exports and wait until the checkpoint is complete; its path."""
    in_flight = trainer.rollouts.in_flight()
    path = trainer.checkpoints.save(state, trainer.models, in_flight, unlogged, again=again, exports=False)
    trainer.checkpoints.finish()
    return str(path)
