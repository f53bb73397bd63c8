"""Rollouts of an earlier run fed back: the same updates without an engine."""

from collections.abc import Sequence
from pathlib import Path

from megatron_rl.distributed.collectives import raise_together
from megatron_rl.errors import DataError
from megatron_rl.rollout.partial import PartialGroup
from megatron_rl.rollout.serialization import (
    number_from_json,
    prompt_from_json,
    read_rollouts,
    rollout_from_json,
    step_file,
)
from megatron_rl.rollout.source import RolloutBatch
from megatron_rl.types import ParallelContext, Prompt, Rollout, RolloutGroup


class ReplaySource:
    """Every step gets the groups that the recorded run had in it, with the rewards that they had."""

    uses_engine = False
    has_rewards = True

    def __init__(self, folder: Path, parallel: ParallelContext) -> None:
        """
        Args:
            folder: step_*.jsonl, as metrics.keep_rollouts_every=1 leaves them in rollouts/ of a run's folder.

        Raises:
            DataError: there are none.
        """
        if not any(folder.glob("step_*.jsonl")):
            raise DataError(
                f"rollout.replay_path={folder} has no step_*.jsonl. Record them with metrics.keep_rollouts_every=1."
            )
        self._folder = folder
        self._parallel = parallel

    def drain(self, version: int) -> None:
        pass

    def collect(self, step: int, num_prompts_consumed: int) -> RolloutBatch:
        prompts: dict[int, Prompt] = {}
        rollouts: dict[int, list[Rollout]] = {}
        baselines: dict[int, float] = {}
        with raise_together(self._parallel):
            for line in read_rollouts(step_file(self._folder, step)):
                prompts.setdefault(line["group"], prompt_from_json(line))
                baselines[line["group"]] = number_from_json(line.get("baseline", 0.0))  # older files: none
                rollouts.setdefault(line["group"], []).append(rollout_from_json(line))
        groups = [
            RolloutGroup(index=index, prompt=prompts[index], rollouts=rollouts[index], baseline=baselines[index])
            for index in sorted(prompts)
        ]
        return RolloutBatch(groups=groups, num_prompts=len(groups))

    def in_flight(self) -> Sequence[PartialGroup]:
        return ()

    def resume(self, in_flight: Sequence[PartialGroup]) -> None:
        pass
