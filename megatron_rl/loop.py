"""The training loop. Every rank executes these same lines."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

from megatron_rl.build import (
    Inputs,
    build_collector,
    build_engine,
    build_evaluator,
    build_examiner,
    build_judge,
    build_keeper,
    build_log,
    build_models,
    build_sampler,
    device_peak,
    fresh_state,
    read_inputs,
)
from megatron_rl.cadence import is_due
from megatron_rl.checkpoints import Checkpoints
from megatron_rl.collective import raise_together
from megatron_rl.config import RunConfig, validate
from megatron_rl.drift import check_drift
from megatron_rl.errors import EngineDied, Interrupted
from megatron_rl.examiner import Examiner
from megatron_rl.forecast import forecast
from megatron_rl.heartbeat import Heartbeat, seconds_until_stuck
from megatron_rl.judging import Judge
from megatron_rl.learning import learn
from megatron_rl.ledger import Ledger
from megatron_rl.mcore.parallel import describe_layout, init_parallel, launcher_world, leave_world
from megatron_rl.mcore.reference import BaseReference
from megatron_rl.metrics.metric import Metrics, Reduction, merge
from megatron_rl.metrics.timing import Stopwatch
from megatron_rl.profiling import profiled
from megatron_rl.rollout.engine import Engine
from megatron_rl.rollout.evaluator import Evaluator, Sample
from megatron_rl.rollout.keeper import EngineKeeper
from megatron_rl.rollout.sampler import Collected, Sampler
from megatron_rl.rollout.statistics import staleness_metrics
from megatron_rl.run_folder import RunFolder
from megatron_rl.run_log import RunLog
from megatron_rl.run_models import Reference, RunModels
from megatron_rl.step_metrics import rollout_metrics
from megatron_rl.stop import StopRequest
from megatron_rl.types import ParallelContext, TrainState

InEngine = Callable[[TrainState, Stopwatch], AbstractContextManager[dict[str, Reduction]]]
"""``policy_in_engine`` of a run."""


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
    stop = StopRequest(parallel, before_end_s=config.run.stop_before_end_s)
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
    planned = forecast(config, parallel)
    checkpoints = Checkpoints(folder, config, parallel)
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
        if config.rollout.sleep:
            with raise_together(parallel):
                engine.sleep()
    heartbeat.enter("restore")
    state = checkpoints.restore(checkpoint, models) if checkpoint else fresh_state(parallel)
    load_reference(models.reference, checkpoints.reference_of(state), parallel)
    keeper = build_keeper(config, engine, policy)
    with raise_together(parallel):
        collector = build_collector(config, inputs, keeper, policy)
    with closing(engine), closing(collector):
        with raise_together(parallel):
            sampler = build_sampler(config, inputs, collector, parallel)
            sampler.resume(checkpoints.in_flight(checkpoint) if checkpoint else ())
            unlogged = checkpoints.unlogged(checkpoint) if checkpoint else None
        evaluator = build_evaluator(config, inputs, collector)
        with raise_together(parallel):
            if parallel.is_main:
                folder.create(config)
            console, sinks = build_log(config, folder, state, parallel, unlogged=unlogged is not None)
        with closing(
            RunLog(
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
            judge = build_judge(config, inputs, models)
            examiner = build_examiner(config, inputs, keeper, policy, log.note)
            course = Course(config, models, sampler, judge, evaluator, examiner, keeper, checkpoints, log, heartbeat)
            return train(course, state, unlogged, parallel, stop)


@dataclass(frozen=True)
class Course:
    """What takes part in every step."""

    config: RunConfig
    models: RunModels
    sampler: Sampler
    judge: Judge | None
    evaluator: Evaluator | None
    examiner: Examiner | None
    keeper: EngineKeeper
    checkpoints: Checkpoints
    log: RunLog
    heartbeat: Heartbeat

    def evaluator_after(self, step: int) -> Evaluator | None:
        """Who has questions after a step, also after none."""
        is_asked = step == 0 or is_due(self.config.evaluation.every, step, self.config.run.num_steps)
        return self.evaluator if is_asked else None

    def examiner_after(self, step: int) -> Examiner | None:
        """Who has benchmarks after a step, also after none."""
        is_asked = step == 0 or is_due(self.config.evaluation.suite_every, step, self.config.run.num_steps)
        return self.examiner if is_asked else None


def train(
    course: Course,
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
    ledger = Ledger(course.models, course.keeper.engine)
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
        return stop.is_to_start_again()
    return False


def refill_engine(course: Course, state: TrainState) -> None:
    """After a resume, give the engine the weights that an evaluation had given it before the stop.

    What such a push measures belongs to the step that was evaluated, whose metrics are logged, and not to the next.
    """
    if course.sampler.uses_engine and (course.evaluator_after(state.step) or course.examiner_after(state.step)):
        watch = Stopwatch(course.heartbeat.enter)
        engines_may_die = saved_if_engines_die(course.checkpoints, state, course.models, course.sampler)
        with watch.span("update_weights"), engines_may_die, policy_in_engine(course, state, watch):
            pass


def take_step(
    course: Course, ledger: Ledger, state: TrainState, watch: Stopwatch, parallel: ParallelContext
) -> tuple[TrainState, dict[str, Reduction], bool]:
    """Sample and learn: the state after the step, what is known of it, and whether there was anything to learn."""
    config, models, sampler, keeper, log = course.config, course.models, course.sampler, course.keeper, course.log
    step = state.step + 1
    metrics: dict[str, Reduction] = {}
    with profiled(config.profiling, log.profile_folder, step, parallel):
        with saved_if_engines_die(course.checkpoints, state, models, sampler):
            with watch.span("gen"):
                sampler.settle(version=state.step)
            with room_for_engine(models, keeper.engine, config, watch):
                if sampler.uses_engine:
                    with watch.span("update_weights"):
                        metrics |= keeper.push(version=state.step)
                    ledger.look("push")
                with watch.span("gen"), awake(keeper.engine, config, parallel):
                    ledger.look("generation")
                    collected = sampler.collect(step, state.num_prompts_consumed)
        if course.judge is not None:
            with watch.span("reward_model"):
                collected, judged = course.judge(collected)
            metrics |= judged
        batch = None
        if not config.run.rollout_only:
            batch, state, learnt = learn(collected.groups, config, state, models, watch, graded=sampler.is_graded)
            metrics |= learnt
        ledger.look("update")
        if sampler.is_graded and batch is not None:
            check_drift(metrics, config.rollout, parallel, log.note)
    metrics |= rollout_metrics(collected, batch, models.policy.spec, graded=sampler.is_graded, parallel=parallel)
    if sampler.is_graded and parallel.is_main:
        metrics |= staleness_metrics(collected.groups, version=step - 1)
    log.collected(step, collected)
    if course.evaluator is None and sampler.is_graded and step % config.metrics.log_every == 0:
        log.show(step, collected.groups[0])
    if step == 1:
        log.note(ledger.table())
    return advance(state, collected), metrics, batch is not None


def conclude(
    course: Course, state: TrainState, metrics: Metrics, watch: Stopwatch, *, is_learnt: bool = True
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
        assert not isinstance(reference, BaseReference), "a reference that never changes"
        with raise_together(parallel):
            reference.load(path)


@contextmanager
def saved_if_engines_die(
    checkpoints: Checkpoints,
    state: TrainState,
    models: RunModels,
    sampler: Sampler,
    unlogged: Metrics | None = None,
) -> Iterator[None]:
    """Leave a checkpoint behind when engines died too often to go on."""
    try:
        yield
    except EngineDied:
        checkpoints.save(state, models, sampler.in_flight(), unlogged, exports=False)
        checkpoints.finish()
        raise


@contextmanager
def room_for_engine(models: RunModels, engine: Engine | None, config: RunConfig, watch: Stopwatch) -> Iterator[None]:
    """Lend the memory of memory.offload to the engine, which gives its own up where the run is interrupted."""
    if config.memory.offload:
        with watch.span("offload"):
            for learner in models.learners.values():
                learner.to_host()
    try:
        yield
    except Interrupted:
        if engine is not None and config.rollout.sleep:
            with raise_together(models.policy.parallel):
                engine.sleep()
        raise
    finally:
        if config.memory.offload:
            with watch.span("onload"):
                for learner in models.learners.values():
                    learner.to_device()


@contextmanager
def awake(engine: Engine, config: RunConfig, parallel: ParallelContext) -> Iterator[None]:
    """The engine with its cache, for as long as rollout.sleep lets it."""
    if not config.rollout.sleep:
        yield
        return
    with raise_together(parallel):
        engine.wake("kv_cache")
    yield
    with raise_together(parallel):
        engine.sleep()


def advance(state: TrainState, collected: Collected) -> TrainState:
    """The state after a step."""
    return replace(
        state,
        step=state.step + 1,
        num_prompts_consumed=state.num_prompts_consumed + collected.num_prompts,
    )


@contextmanager
def policy_in_engine(course: Course, state: TrainState, watch: Stopwatch) -> Iterator[dict[str, Reduction]]:
    """The engine with the policy of a step, for something else than the next step; gives metrics of the push."""
    sampler, models, config, keeper, log = course.sampler, course.models, course.config, course.keeper, course.log
    sampler.settle(version=state.step)
    with room_for_engine(models, keeper.engine, config, watch):
        pushed = keeper.push(version=state.step)
        with awake(keeper.engine, config, models.policy.parallel):
            yield pushed
    for note in keeper.take_notes():
        log.note(note)


def evaluate(
    evaluator: Evaluator, in_engine: InEngine, log: RunLog, state: TrainState, watch: Stopwatch
) -> tuple[dict[str, Reduction], Sequence[Sample]]:
    """Held-out metrics, counted once, and some responses."""
    with watch.span("testing"), in_engine(state, watch) as pushed:
        metrics, samples = evaluator.evaluate(state.step)
    headline = {name.removeprefix("eval/"): metrics[name].result() for name in evaluator.headline}
    shown = [f"{name} {value:.4g}" for name, value in headline.items()]
    log.note(f"held out, step {state.step}: {', '.join(shown)}")
    return pushed | metrics, samples


def examine(examiner: Examiner, in_engine: InEngine, state: TrainState, watch: Stopwatch) -> dict[str, Reduction]:
    """Metrics of the benchmarks, on the first rank."""
    with watch.span("benchmarks"), in_engine(state, watch):
        return examiner.examine(state.step)


def describe(config: RunConfig, inputs: Inputs, parallel: ParallelContext, resumed: str | None) -> str:
    """What is about to happen, in a few lines."""
    rollout, batching = config.rollout, config.batching
    group = rollout.group_size if rollout.source != "demonstrations" else 1
    sequences = rollout.num_prompts_per_step * group
    lines = [
        f"{config.run.name}: {config.model.path} in {config.model.dtype}, "
        f"{describe_layout(parallel)} on {parallel.device.type}, "
        f"{config.run.num_steps} steps" + (f", resumed from {resumed}" if resumed else ""),
        f"each step: {rollout.num_prompts_per_step} prompts x {group} = {sequences} sequences; each optimizer update: "
        f"{sequences // batching.num_updates} sequences; {batching.num_updates * batching.num_epochs} updates per step",
    ]
    held_out = inputs.evaluation.num_overlong if inputs.evaluation else 0
    if inputs.train.num_overlong or held_out:
        lines.append(
            f"dropped as longer than data.max_prompt_tokens={config.data.max_prompt_tokens}: "
            f"{inputs.train.num_overlong} training prompts, {held_out} held-out prompts"
        )
    return "\n".join(lines)
