"""The training state from step to step."""

import uuid
from dataclasses import replace

from megatron_rl.distributed.collectives import gather_objects
from megatron_rl.rollout.source import RolloutBatch
from megatron_rl.types import ParallelContext, TrainBatch, TrainState


def initial_state(parallel: ParallelContext) -> TrainState:
    """The state of a new run, the same on every rank; collective."""
    return TrainState(wandb_id=gather_objects(uuid.uuid4().hex[:8], parallel)[0])


def advance(state: TrainState, rollouts: RolloutBatch) -> TrainState:
    """The state after a step."""
    return replace(consume(state, rollouts.num_prompts), step=state.step + 1)


def consume(state: TrainState, num_prompts: int) -> TrainState:
    """The state after ``num_prompts`` more prompts have been taken from the data."""
    return replace(state, num_prompts_consumed=state.num_prompts_consumed + num_prompts)


def count_updates(state: TrainState, batch: TrainBatch) -> TrainState:
    """The state with the optimizer updates of a batch counted."""
    return replace(state, num_updates=state.num_updates + len(batch.updates))


def is_due(every: int, step: int, num_steps: int) -> bool:
    """Whether something that happens every ``every`` steps (0: never) and after the last is due after this step."""
    return step == num_steps or (every > 0 and step % every == 0)
