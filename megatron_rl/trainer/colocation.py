"""Trainer and engine on the same devices: offload the trainer, wake the engine, and back."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from megatron_rl.config import RunConfig
from megatron_rl.distributed.collectives import raise_together
from megatron_rl.errors import Interrupted
from megatron_rl.metrics.metric import Reduction
from megatron_rl.metrics.timing import Stopwatch
from megatron_rl.rollout.engines.base import Engine
from megatron_rl.trainer.context import Trainer
from megatron_rl.trainer.models import RunModels
from megatron_rl.types import ParallelContext, TrainState

InEngine = Callable[[TrainState, Stopwatch], AbstractContextManager[dict[str, Reduction]]]
"""``policy_in_engine`` of a run."""


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
        if engine is not None and config.rollout.sleep_engine:
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
    """The engine with its cache, for as long as rollout.sleep_engine lets it."""
    if not config.rollout.sleep_engine:
        yield
        return
    with raise_together(parallel):
        engine.wake("kv_cache")
    yield
    with raise_together(parallel):
        engine.sleep()


@contextmanager
def policy_in_engine(course: Trainer, state: TrainState, watch: Stopwatch) -> Iterator[dict[str, Reduction]]:
    """The engine with the policy of a step, for something else than the next step; gives metrics of the push."""
    sampler, models, config, keeper, log = course.sampler, course.models, course.config, course.keeper, course.log
    sampler.drain(version=state.step)
    with room_for_engine(models, keeper.engine, config, watch):
        pushed = keeper.push(version=state.step)
        with awake(keeper.engine, config, models.policy.parallel):
            yield pushed
    for note in keeper.take_notes():
        log.note(note)
