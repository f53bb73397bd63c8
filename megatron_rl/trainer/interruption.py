"""Checkpoints of a run that a stop request or dead engines end in the middle of a phase."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_rl.errors import EngineDied, Interrupted
from megatron_rl.metrics.metric import Metrics
from megatron_rl.trainer.context import Trainer
from megatron_rl.trainer.state import consume
from megatron_rl.types import TrainState


@contextmanager
def checkpoint_on_abort(trainer: Trainer, state: TrainState, unlogged: Metrics | None = None) -> Iterator[None]:
    """Save a checkpoint of ``state`` if the body is interrupted or its engines die too often.

    Every use of the engines belongs into such a body: nothing else saves what an interruption leaves behind.

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
        interruption.is_saved = True
        raise


def save_on_stop(trainer: Trainer, state: TrainState, unlogged: Metrics | None = None, *, again: bool = False) -> None:
    """Save without exports, as time is short, and tell the user how to continue."""
    path = save_and_finish(trainer, state, unlogged, again=again)
    trainer.log.note(
        f"stopped on request after step {state.step}; saved {path}. Start the same command again to continue."
    )


def save_and_finish(trainer: Trainer, state: TrainState, unlogged: Metrics | None, *, again: bool = False) -> str:
    """Save without exports and wait until the checkpoint is complete; its path."""
    in_flight = trainer.rollout_source.in_flight()
    path = trainer.checkpoints.save(state, trainer.models, in_flight, unlogged, again=again, exports=False)
    trainer.checkpoints.finish()
    return str(path)
