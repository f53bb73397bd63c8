"""Rollout source that replays the recorded rollouts of an earlier run: the same updates without an engine."""

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
    """Returns for every step the groups of the same step of the recorded run, with their recorded rewards."""

    uses_engine = False
    has_rewards = True

    def __init__(self, folder: Path, parallel: ParallelContext) -> None:
        """
        Args:
            folder: folder of step_*.jsonl files, which metrics.keep_rollouts_every=1 writes to rollouts/ in the run
                folder.

        Raises:
            DataError: the folder has no such files.
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
                baselines[line["group"]] = number_from_json(line.get("baseline", 0.0))  # absent in older files
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
