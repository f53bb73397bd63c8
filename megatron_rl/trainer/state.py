"""The training state from step to step."""

import uuid
from dataclasses import replace

from megatron_rl.distributed.collectives import gather_objects
from megatron_rl.rollout.source import RolloutBatch
from megatron_rl.types import ParallelContext, TrainState


def advance(state: TrainState, collected: RolloutBatch) -> TrainState:
    """The state after a step."""
    return replace(
        state,
        step=state.step + 1,
        num_prompts_consumed=state.num_prompts_consumed + collected.num_prompts,
    )


def fresh_state(parallel: ParallelContext) -> TrainState:
    """The state of a run that begins; the same on every rank."""
    return TrainState(wandb_id=gather_objects(uuid.uuid4().hex[:8], parallel)[0])


def is_due(every: int, step: int, num_steps: int) -> bool:
    """After the last step always, otherwise every so many; 0 is never in between."""
    return step == num_steps or (every > 0 and step % every == 0)
