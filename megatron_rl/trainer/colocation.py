"""Trainer and engine on the same devices: offload the trainer, wake the engine, and back."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from megatron_rl.config import RunConfig
from megatron_rl.distributed.collectives import raise_together
from megatron_rl.errors import Interrupted
from megatron_rl.metrics.metric import Reduction
from megatron_rl.trainer.context import Step, Trainer
from megatron_rl.trainer.models import RunModels
from megatron_rl.types import TrainState


@contextmanager
def models_offloaded(
    models: RunModels, config: RunConfig, timer: Callable[[str], AbstractContextManager[None]]
) -> Iterator[None]:
    """Keep the parts of ``memory.offload`` in host memory during the body."""
    if not config.memory.offload:
        yield
        return
    with timer("offload"):
        for learner in models.learners.values():
            learner.to_host()
    try:
        yield
    finally:
        with timer("onload"):
            for learner in models.learners.values():
                learner.to_device()


@contextmanager
def trainer_offloaded(trainer: Trainer, step: Step) -> Iterator[None]:
    """Offload the trainer during the body; put the engine to sleep before the trainer returns from an interruption."""
    with models_offloaded(trainer.models, trainer.config, step.timer):
        try:
            yield
        except Interrupted:
            if trainer.config.rollout.sleep_engine:
                with raise_together(trainer.parallel):
                    trainer.supervisor.engine.sleep()
            raise


@contextmanager
def engine_awake(trainer: Trainer) -> Iterator[None]:
    """Give the engine its KV cache during the body, where ``rollout.sleep_engine`` takes it away otherwise.

    After an interruption ``trainer_offloaded`` puts the engine to sleep.
    """
    if not trainer.config.rollout.sleep_engine:
        yield
        return
    engine = trainer.supervisor.engine
    with raise_together(trainer.parallel):
        engine.wake("kv_cache")
    yield
    with raise_together(trainer.parallel):
        engine.sleep()


@contextmanager
def policy_in_engine(trainer: Trainer, state: TrainState, step: Step) -> Iterator[dict[str, Reduction]]:
    """Push the policy of ``state`` to the engine for use in the body; yields the metrics of the push."""
    trainer.rollout_source.drain(version=state.step)
    with trainer_offloaded(trainer, step):
        pushed = trainer.supervisor.push(version=state.step)
        with engine_awake(trainer):
            yield pushed
    for note in trainer.supervisor.take_notes():
        trainer.log.note(note)
