"""What happens every few steps: evaluation, benchmarks, reference resets, checkpoints."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from megatron_rl.checkpointing.manager import CheckpointManager
from megatron_rl.distributed.collectives import raise_together
from megatron_rl.errors import EngineDied
from megatron_rl.evaluation.in_training import BenchmarkEvaluator
from megatron_rl.evaluation.validation import Sample, Validator
from megatron_rl.mcore.reference import AdapterFreeReference
from megatron_rl.metrics.metric import Metrics, Reduction, merge
from megatron_rl.metrics.timing import Stopwatch
from megatron_rl.rollout.source import RolloutSource
from megatron_rl.trainer.colocation import InEngine, policy_in_engine
from megatron_rl.trainer.context import Trainer
from megatron_rl.trainer.logger import RunLogger
from megatron_rl.trainer.models import Reference, RunModels
from megatron_rl.trainer.state import is_due
from megatron_rl.types import ParallelContext, TrainState


def refill_engine(course: Trainer, state: TrainState) -> None:
    """After a resume, give the engine the weights that an evaluation had given it before the stop.

    What such a push measures belongs to the step that was evaluated, whose metrics are logged, and not to the next.
    """
    if course.sampler.uses_engine and (course.evaluator_after(state.step) or course.examiner_after(state.step)):
        watch = Stopwatch(course.heartbeat.enter)
        engines_may_die = saved_if_engines_die(course.checkpoints, state, course.models, course.sampler)
        with watch.span("update_weights"), engines_may_die, policy_in_engine(course, state, watch):
            pass


def conclude(
    course: Trainer, state: TrainState, metrics: Metrics, watch: Stopwatch, *, is_learnt: bool = True
) -> TrainState:
    """Evaluate, save and log what is due after a step, also after none; the state with the reference that was kept."""
    config, models, checkpoints, step = course.config, course.models, course.checkpoints, state.step
    metrics = dict(metrics)
    samples: Sequence[Sample] = []
    in_engine = partial(policy_in_engine, course)
    with saved_if_engines_die(checkpoints, state, models, course.sampler, metrics if step else None):
        if evaluator := course.evaluator_after(step):
            held_out, samples = evaluate(evaluator, in_engine, course.log, state, watch)
            metrics = merge([metrics, held_out])
        if examiner := course.examiner_after(step):
            metrics |= examine(examiner, in_engine, state, watch)
    course.log.samples(samples)
    if step == 0:
        course.log.step(0, metrics)
        return state
    checkpoints.finish_if_written()
    every = config.algorithm.reference_reset_every
    if every and step % every == 0:
        with watch.span("reset_reference"):
            state = checkpoints.keep_as_reference(state, models.policy)
            load_reference(models.reference, checkpoints.reference_of(state), models.policy.parallel)
    if is_learnt and is_due(config.checkpoint.every, step, config.run.num_steps):
        with watch.span("save_checkpoint"):
            checkpoints.save(state, models, course.sampler.in_flight())
    # after a resume the metrics have the seconds of before
    course.log.step(step, merge([metrics, watch.metrics()]))
    return state


def load_reference(reference: Reference | None, path: str | None, parallel: ParallelContext) -> None:
    """Give the reference the weights of an earlier step's policy, if one took its place."""
    if reference is not None and path is not None:
        assert not isinstance(reference, AdapterFreeReference), "a reference that never changes"
        with raise_together(parallel):
            reference.load(path)


@contextmanager
def saved_if_engines_die(
    checkpoints: CheckpointManager,
    state: TrainState,
    models: RunModels,
    sampler: RolloutSource,
    unlogged: Metrics | None = None,
) -> Iterator[None]:
    """Leave a checkpoint behind when engines died too often to go on."""
    try:
        yield
    except EngineDied:
        checkpoints.save(state, models, sampler.in_flight(), unlogged, exports=False)
        checkpoints.finish()
        raise


def evaluate(
    evaluator: Validator, in_engine: InEngine, log: RunLogger, state: TrainState, watch: Stopwatch
) -> tuple[dict[str, Reduction], Sequence[Sample]]:
    """Held-out metrics, counted once, and some responses."""
    with watch.span("testing"), in_engine(state, watch) as pushed:
        metrics, samples = evaluator.evaluate(state.step)
    headline = {name.removeprefix("val/"): metrics[name].result() for name in evaluator.headline}
    shown = [f"{name} {value:.4g}" for name, value in headline.items()]
    log.note(f"held out, step {state.step}: {', '.join(shown)}")
    return pushed | metrics, samples


def examine(
    examiner: BenchmarkEvaluator, in_engine: InEngine, state: TrainState, watch: Stopwatch
) -> dict[str, Reduction]:
    """Metrics of the benchmarks, on the first rank."""
    with watch.span("benchmarks"), in_engine(state, watch):
        return examiner.examine(state.step)
