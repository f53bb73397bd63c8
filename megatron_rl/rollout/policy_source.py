"""Rollouts sampled by the policy, with partial rollouts carried over and groups with zero reward std replaced."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_rl.config.rollout import RolloutSection
from megatron_rl.data.curriculum import Curriculum
from megatron_rl.rollout.collector import Collector, Job, JobInterrupted, Pending
from megatron_rl.rollout.engines.sampling import sample_seed
from megatron_rl.rollout.multi_turn import MultiTurn
from megatron_rl.rollout.partial import PartialGroup, PartialRollout, begin_group
from megatron_rl.rollout.source import RolloutBatch
from megatron_rl.types import RolloutGroup, SamplingParams


@dataclass(frozen=True, kw_only=True)
class _StepProgress:
    """Progress of a step after some of its rounds."""

    step: int
    start: int
    """Index in the data of the first new prompt of the step."""
    num_prompts: int = 0
    """New prompts taken from the data so far."""
    kept: tuple[PartialGroup, ...] = ()
    """Complete groups to train on."""
    zero_std: tuple[PartialGroup, ...] = ()
    """Complete groups whose samples all have the same reward; empty without ``rollout.dynamic_sampling``."""
    open: tuple[PartialGroup, ...] = ()
    """Groups that are not complete."""
    num_rounds: int = 0
    num_restarted: int = 0
    """Carried-over samples that were too old to continue and are sampled again."""


class PolicySource:
    """Samples the groups of every step from the policy.

    A step consists of rounds. Each round continues the groups that were carried over, adds new prompts, and ends when
    enough groups are complete; a step of plain GRPO has one round of ``num_prompts_per_step`` new prompts.
    """

    uses_engine = True
    has_rewards = True

    def __init__(
        self,
        config: RolloutSection,
        curriculum: Curriculum,
        collector: Collector,
        params: SamplingParams,
        *,
        multi_turn: MultiTurn | None,
        seed: int,
        num_steps: int,
        num_mini_batches: int,
    ) -> None:
        """
        Args:
            params: sampling parameters; the curriculum sets ``max_new_tokens``.
            multi_turn: environment of multi-turn rollouts; None: a sample is one response.
            seed: seed of the run.
            num_steps: steps of the run.
            num_mini_batches: number of equal parts that the sequences of a step must divide into.
        """
        self._config = config
        self._curriculum = curriculum
        self._collector = collector
        self._params = params
        self._multi_turn = multi_turn
        self._seed = seed
        self._num_steps = num_steps
        # the number of groups must be a multiple of this, so that their sequences divide into the mini-batches
        self._multiple = num_mini_batches // math.gcd(num_mini_batches, config.group_size)
        self._carried: tuple[PartialGroup, ...] = ()
        self._pending: Pending | None = None
        self._ahead: _StepProgress | None = None  # of the next step, if it was started in the background

    def drain(self, version: int) -> None:
        if self._pending is not None:
            assert self._ahead is not None
            pending, self._pending = self._pending, None
            self._ahead = self._after_round(self._ahead, self._collector.finish(pending, version))
        self._collector.supervisor.restart_dead()

    def collect(self, step: int, num_prompts_consumed: int) -> RolloutBatch:
        if self._pending is not None:
            self.drain(step - 1)
        progress = self._ahead if self._ahead is not None else self._start_step(step, num_prompts_consumed)
        while not self._is_enough(progress):
            progress = self._run_round(progress)
        self._ahead = None
        batch = self._finish_step(progress)
        if self._config.async_rollout and step < self._num_steps:
            self._begin_ahead(step + 1, num_prompts_consumed + batch.num_prompts)
        return batch

    def _begin_ahead(self, step: int, start: int) -> None:
        """Start generating the next step's samples in the background while the policy trains on the current step's."""
        self._ahead = self._add_prompts(self._start_step(step, start))
        self._pending = self._collector.begin(self._job(self._ahead, version=step - 2))

    def in_flight(self) -> Sequence[PartialGroup]:
        # a step that was started in the background is sampled again after a resume, from the same prompts
        return self._carried

    def resume(self, in_flight: Sequence[PartialGroup]) -> None:
        self._carried = tuple(in_flight)

    def _start_step(self, step: int, start: int) -> _StepProgress:
        """Return the initial progress: the carried-over groups, with samples reset that exceed ``max_staleness``."""
        oldest_allowed = step - 1 - self._config.max_staleness
        groups = [group.restart_stale(oldest_allowed) for group in self._carried]
        restarted = sum(
            old is not new
            for before, after in zip(self._carried, groups, strict=True)
            for old, new in zip(before.samples, after.samples, strict=True)
        )
        return self._sort_groups(_StepProgress(step=step, start=start, num_restarted=restarted), groups)

    def _run_round(self, progress: _StepProgress) -> _StepProgress:
        progress = self._add_prompts(progress)
        try:
            return self._after_round(progress, self._collector.collect(self._job(progress, version=progress.step - 1)))
        except JobInterrupted as interruption:
            self._carry(progress, interruption.groups, interruption)
            raise

    def _carry(self, progress: _StepProgress, groups: Sequence[PartialGroup], interruption: JobInterrupted) -> None:
        """Keep the groups of an interrupted step if ``rollout.partial_rollout`` is set.

        Otherwise the step starts again from the beginning, so that it gets the same samples as without the
        interruption.
        """
        if self._config.partial_rollout:
            self._carried = (*progress.kept, *progress.zero_std, *groups)
            interruption.num_prompts = progress.num_prompts

    def _after_round(self, progress: _StepProgress, groups: Sequence[PartialGroup]) -> _StepProgress:
        return replace(self._sort_groups(progress, groups), num_rounds=progress.num_rounds + 1)

    def _add_prompts(self, progress: _StepProgress) -> _StepProgress:
        """Add groups of new prompts until ``over_sampling`` times the missing groups are open."""
        config = self._config
        missing = config.num_prompts_per_step - len(progress.kept)
        num_new = max(0, math.ceil(missing * config.over_sampling) - len(progress.open))
        groups, order = [], self._curriculum.at(progress.step).order
        for number in range(progress.num_prompts, progress.num_prompts + num_new):
            seeds = [sample_seed(self._seed, progress.step, number, k) for k in range(config.group_size)]
            groups.append(begin_group(order.take(progress.start + number, 1)[0], seeds))
        return replace(progress, num_prompts=progress.num_prompts + num_new, open=(*progress.open, *groups))

    def _job(self, progress: _StepProgress, version: int) -> Job:
        config = self._config
        missing = config.num_prompts_per_step - len(progress.kept)
        return Job(
            name=f"rollout/{progress.step}/{progress.num_rounds}",
            groups=progress.open,
            params=self._params_at(progress.step),
            schedule=config.schedule,
            functions="train",
            version=version,
            multi_turn=self._multi_turn,
            num_groups_needed=missing if len(progress.open) > missing else None,
            max_tokens_per_round=config.max_tokens_per_round,
            max_seconds=config.max_seconds_per_round,
        )

    def _params_at(self, step: int) -> SamplingParams:
        return replace(self._params, max_new_tokens=self._curriculum.at(step).max_new_tokens)

    def _sort_groups(self, progress: _StepProgress, groups: Sequence[PartialGroup]) -> _StepProgress:
        """Return the progress with its open groups replaced by ``groups``; complete ones go to the other lists."""
        complete = [
            (group, self._config.dynamic_sampling and _has_zero_std(group)) for group in groups if group.is_complete
        ]
        return replace(
            progress,
            kept=(*progress.kept, *(group for group, has_zero_std in complete if not has_zero_std)),
            zero_std=(*progress.zero_std, *(group for group, has_zero_std in complete if has_zero_std)),
            open=tuple(group for group in groups if not group.is_complete),
        )

    def _is_enough(self, progress: _StepProgress) -> bool:
        config, num_kept = self._config, len(progress.kept)
        if num_kept >= config.num_prompts_per_step:
            return True
        if (
            num_kept + len(progress.zero_std) >= config.num_prompts_per_step
            and progress.num_rounds >= config.max_rounds
        ):
            return True
        return config.max_seconds_per_round is not None and num_kept >= self._multiple and progress.num_rounds > 0

    def _finish_step(self, progress: _StepProgress) -> RolloutBatch:
        """Return the groups of the step; carry the others over, or drop them without ``rollout.partial_rollout``.

        Raises:
            RewardError: too many rewards failed.
        """
        self._collector.check_rewards((*progress.kept, *progress.zero_std))
        config = self._config
        count = config.num_prompts_per_step
        if config.max_seconds_per_round is not None:
            count = min(count, len(progress.kept) // self._multiple * self._multiple) or count
        # after max_rounds groups with zero std fill the step
        filling = progress.zero_std[: max(0, count - len(progress.kept))]
        selected = (*progress.kept[:count], *filling)
        rest = (*progress.kept[count:], *progress.open)
        groups = [group.as_group(index) for index, group in enumerate(selected)]
        if config.greedy_baseline:
            try:
                groups = self._with_baselines(groups, progress.step)
            except JobInterrupted as interruption:
                self._carry(progress, progress.open, interruption)
                raise
        self._carried = rest if config.partial_rollout else ()
        num_dropped = 0 if config.partial_rollout else len(rest)
        counts = {
            "rollout/rounds": progress.num_rounds,
            "rollout/carried_over": len(self._carried),
            "rollout/aborted": num_dropped,
            "rollout/restarted_as_stale": progress.num_restarted,
            "rollout/zero_std/replaced": len(progress.zero_std) - len(filling),
            "rollout/engine_failures": self._collector.supervisor.num_failures,
            "data/stage": self._curriculum.at(progress.step).number,
        }
        return RolloutBatch(
            groups=groups,
            num_prompts=progress.num_prompts,
            counts=counts,
            notes=self._collector.supervisor.take_notes(),
        )

    def _with_baselines(self, groups: Sequence[RolloutGroup], step: int) -> list[RolloutGroup]:
        """Return the groups with the reward of their prompt's greedy response as ``baseline``.

        Raises:
            RewardError: too many rewards of the greedy responses failed.
        """
        job = Job(
            name=f"rollout/{step}/baseline",
            groups=[begin_group(group.prompt, [0]) for group in groups],
            params=replace(self._params_at(step), temperature=0.0, top_p=1.0, top_k=0),
            schedule=self._config.schedule,
            functions="train",
            version=step - 1,
            multi_turn=self._multi_turn,
        )
        greedy_groups = self._collector.collect(job)
        self._collector.check_rewards(greedy_groups)
        return [
            replace(group, baseline=greedy.as_group(0).rollouts[0].reward)
            for group, greedy in zip(groups, greedy_groups, strict=True)
        ]


def _has_zero_std(group: PartialGroup) -> bool:
    """Whether all graded samples have the same reward, so that their advantages are zero."""
    rewards = {s.reward for s in group.samples if not isinstance(s, PartialRollout) and s.status == "ok"}
    return len(rewards) <= 1
