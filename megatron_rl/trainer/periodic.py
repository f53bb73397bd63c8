"""What happens every few steps: evaluation, benchmarks, reference resets, checkpoints."""

from collections.abc import Sequence

from megatron_rl.evaluation.validation import Sample, Validator
from megatron_rl.trainer.colocation import policy_in_engine
from megatron_rl.trainer.context import Step, Trainer
from megatron_rl.trainer.interruption import checkpoint_on_abort
from megatron_rl.trainer.models import load_reference
from megatron_rl.trainer.state import is_due
from megatron_rl.types import TrainState


def evaluate_if_due(trainer: Trainer, state: TrainState, step: Step) -> None:
    """Run validation and benchmarks if they are due after this step (including step 0)."""
    samples: Sequence[Sample] = []
    with checkpoint_on_abort(trainer, state, step.metrics_with_timings() if state.step else None):
        if trainer.validator is not None and is_validation_due(trainer, state.step):
            samples = validate(trainer, trainer.validator, state, step)
        if trainer.benchmarks is not None and are_benchmarks_due(trainer, state.step):
            # the metrics of this push are not logged: the step's row has those of the push before its generation
            with step.timer("benchmarks"), policy_in_engine(trainer, state, step):
                step.log(trainer.benchmarks.evaluate(state.step))
    trainer.log.samples(samples)  # last: logged once even if interrupted benchmarks repeat all of it


def validate(trainer: Trainer, validator: Validator, state: TrainState, step: Step) -> Sequence[Sample]:
    """Generate and grade the held-out prompts; return a few samples."""
    with step.timer("testing"), policy_in_engine(trainer, state, step) as pushed:
        metrics, samples = validator.validate(state.step)
    step.merge(pushed | metrics)  # generation has pushed in this step too
    headline = [f"{name.removeprefix('val/')} {metrics[name].result():.4g}" for name in validator.headline]
    trainer.log.note(f"held out, step {state.step}: {', '.join(headline)}")
    return samples


def is_validation_due(trainer: Trainer, step_number: int) -> bool:
    """Whether ``data.validation`` is evaluated after this step."""
    return step_number == 0 or is_due(trainer.config.validation.every, step_number, trainer.config.run.num_steps)


def are_benchmarks_due(trainer: Trainer, step_number: int) -> bool:
    """Whether ``benchmarks.suite`` runs after this step."""
    return step_number == 0 or is_due(trainer.config.benchmarks.every, step_number, trainer.config.run.num_steps)


def reset_reference_if_due(trainer: Trainer, state: TrainState, step: Step) -> TrainState:
    """Make the current policy the reference every ``algorithm.reference_reset_every`` steps."""
    every = trainer.config.algorithm.reference_reset_every
    if not every or state.step % every:
        return state
    with step.timer("reset_reference"):
        state = trainer.checkpoints.references.keep(state, trainer.models.policy)
        load_reference(trainer.models.reference, trainer.checkpoints.references.path_of(state), trainer.parallel)
    return state


def save_if_due(trainer: Trainer, state: TrainState, step: Step) -> None:
    """Save a checkpoint every ``checkpoint.every`` steps and after the last, except in rollout-only runs."""
    run = trainer.config.run
    if not run.rollout_only and is_due(trainer.config.checkpoint.every, state.step, run.num_steps):
        with step.timer("save_checkpoint"):
            trainer.checkpoints.save(state, trainer.models, trainer.rollout_source.in_flight())
