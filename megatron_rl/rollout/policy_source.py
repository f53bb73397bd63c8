"""The policy's own samples, graded: with long tails cut short and carried over, and groups without spread replaced."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_rl.config.rollout import RolloutSection
from megatron_rl.data.curriculum import Curriculum
from megatron_rl.rollout.collector import Collector, Job, Pending, WorkInterrupted
from megatron_rl.rollout.engines.sampling import sample_seed
from megatron_rl.rollout.multi_turn import MultiTurn
from megatron_rl.rollout.partial import PartialGroup, PartialRollout, begin_group
from megatron_rl.rollout.source import RolloutBatch
from megatron_rl.types import RolloutGroup, SamplingParams


@dataclass(frozen=True, kw_only=True)
class _StepProgress:
    """What the rounds of a step have brought so far."""

    step: int
    start: int
    """Place in the data of the next prompt."""
    num_prompts: int = 0
    """Taken from there."""
    kept: tuple[PartialGroup, ...] = ()
    """Complete groups that teach."""
    idle: tuple[PartialGroup, ...] = ()
    """Complete groups whose samples are all worth the same."""
    open: tuple[PartialGroup, ...] = ()
    num_rounds: int = 0
    num_restarted: int = 0
    """Samples that were too old to go on with."""


class PolicySource:
    """Groups sampled by the policy for each step.

    A step is made of rounds. Each takes up what is carried over, adds fresh prompts, and ends when enough groups are
    complete; a step of plain GRPO has one round of ``num_prompts_per_step`` fresh prompts.
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
        dialogue: MultiTurn | None,
        seed: int,
        num_steps: int,
        num_mini_batches: int,
    ) -> None:
        """
        Args:
            num_steps: of the run.
            num_mini_batches: equal shares that the sequences of a step must divide into.
        """
        self._config = config
        self._curriculum = curriculum
        self._collector = collector
        self._params = params
        self._dialogue = dialogue
        self._seed = seed
        self._num_steps = num_steps
        self._multiple = num_mini_batches // math.gcd(num_mini_batches, config.group_size)
        self._carried: tuple[PartialGroup, ...] = ()
        self._pending: Pending | None = None
        self._ahead: _StepProgress | None = None  # of the step to come, where one is prepared

    def drain(self, version: int) -> None:
        if self._pending is not None:
            assert self._ahead is not None
            pending, self._pending = self._pending, None
            self._ahead = self._after_round(self._ahead, self._collector.finish(pending, version))
        self._collector.keeper.restart_dead()

    def collect(self, step: int, num_prompts_consumed: int) -> RolloutBatch:
        if self._pending is not None:
            self.drain(step - 1)
        harvest = self._ahead if self._ahead is not None else self._take_up(step, num_prompts_consumed)
        while not self._is_enough(harvest):
            harvest = self._round(harvest)
        self._ahead = None
        collected = self._close(harvest)
        if self._config.async_rollout and step < self._num_steps:
            self._begin_ahead(step + 1, num_prompts_consumed + collected.num_prompts)
        return collected

    def _begin_ahead(self, step: int, start: int) -> None:
        """Begin the next step's samples, which are generated while the policy learns from this one's."""
        self._ahead = self._with_fresh(self._take_up(step, start))
        self._pending = self._collector.begin(self._job(self._ahead, version=step - 2))

    def in_flight(self) -> Sequence[PartialGroup]:
        # what the engine has begun in the background is sampled again, from the prompts that are next
        return self._carried

    def resume(self, in_flight: Sequence[PartialGroup]) -> None:
        self._carried = tuple(in_flight)

    def _take_up(self, step: int, start: int) -> _StepProgress:
        """What is carried over, as far as it is not too old when the step learns from it."""
        oldest = step - 1 - self._config.max_staleness
        fresh = [group.fresh_enough(oldest) for group in self._carried]
        restarted = sum(
            old is not new
            for before, after in zip(self._carried, fresh, strict=True)
            for old, new in zip(before.samples, after.samples, strict=True)
        )
        return self._sorted(_StepProgress(step=step, start=start, num_restarted=restarted), fresh)

    def _round(self, harvest: _StepProgress) -> _StepProgress:
        harvest = self._with_fresh(harvest)
        try:
            return self._after_round(harvest, self._collector.collect(self._job(harvest, version=harvest.step - 1)))
        except WorkInterrupted as stop:
            self._carry(harvest, stop.work, stop)
            raise

    def _carry(self, harvest: _StepProgress, work: Sequence[PartialGroup], stop: WorkInterrupted) -> None:
        """Keep what there is of a step that is cut short, where partial steps are kept.

        Otherwise it begins anew, so that it has the samples that it would have had.
        """
        if self._config.partial_rollout:
            self._carried = (*harvest.kept, *harvest.idle, *work)
            stop.num_prompts = harvest.num_prompts

    def _after_round(self, harvest: _StepProgress, work: Sequence[PartialGroup]) -> _StepProgress:
        return replace(self._sorted(harvest, work), num_rounds=harvest.num_rounds + 1)

    def _with_fresh(self, harvest: _StepProgress) -> _StepProgress:
        """Open groups filled up with prompts from the data."""
        config = self._config
        missing = config.num_prompts_per_step - len(harvest.kept)
        wanted = max(0, math.ceil(missing * config.over_sampling) - len(harvest.open))
        begun, order = [], self._curriculum.at(harvest.step).order
        for number in range(harvest.num_prompts, harvest.num_prompts + wanted):
            seeds = [sample_seed(self._seed, harvest.step, number, k) for k in range(config.group_size)]
            begun.append(begin_group(order.take(harvest.start + number, 1)[0], seeds))
        return replace(harvest, num_prompts=harvest.num_prompts + wanted, open=(*harvest.open, *begun))

    def _job(self, harvest: _StepProgress, version: int) -> Job:
        config = self._config
        missing = config.num_prompts_per_step - len(harvest.kept)
        return Job(
            name=f"rollout/{harvest.step}/{harvest.num_rounds}",
            work=harvest.open,
            params=self._params_at(harvest.step),
            schedule=config.schedule,
            functions="train",
            version=version,
            dialogue=self._dialogue,
            enough=missing if len(harvest.open) > missing else None,
            max_tokens_now=config.max_tokens_per_round,
            max_seconds=config.max_seconds_per_round,
        )

    def _params_at(self, step: int) -> SamplingParams:
        return replace(self._params, max_new_tokens=self._curriculum.at(step).max_new_tokens)

    def _sorted(self, harvest: _StepProgress, work: Sequence[PartialGroup]) -> _StepProgress:
        """The harvest with these groups in the place of its open ones."""
        complete = [
            (group, self._config.dynamic_sampling and _has_zero_std(group)) for group in work if group.is_complete
        ]
        return replace(
            harvest,
            kept=(*harvest.kept, *(group for group, is_idle in complete if not is_idle)),
            idle=(*harvest.idle, *(group for group, is_idle in complete if is_idle)),
            open=tuple(group for group in work if not group.is_complete),
        )

    def _is_enough(self, harvest: _StepProgress) -> bool:
        config, num_kept = self._config, len(harvest.kept)
        if num_kept >= config.num_prompts_per_step:
            return True
        if num_kept + len(harvest.idle) >= config.num_prompts_per_step and harvest.num_rounds >= config.max_rounds:
            return True
        return config.max_seconds_per_round is not None and num_kept >= self._multiple and harvest.num_rounds > 0

    def _close(self, harvest: _StepProgress) -> RolloutBatch:
        """The groups of the step; the others are carried over, or given up where that is not asked for.

        Raises:
            RewardError: too many rewards failed.
        """
        self._collector.check_rewards((*harvest.kept, *harvest.idle))
        config = self._config
        count = config.num_prompts_per_step
        if config.max_seconds_per_round is not None:
            count = min(count, len(harvest.kept) // self._multiple * self._multiple) or count
        filling = harvest.idle[: max(0, count - len(harvest.kept))]  # what no round could fill otherwise
        taken = (*harvest.kept[:count], *filling)
        rest = (*harvest.kept[count:], *harvest.open)
        groups = [group.as_group(index) for index, group in enumerate(taken)]
        if config.greedy_baseline:
            try:
                groups = self._with_baselines(groups, harvest.step)
            except WorkInterrupted as stop:
                self._carry(harvest, harvest.open, stop)
                raise
        self._carried = rest if config.partial_rollout else ()
        dropped = 0 if config.partial_rollout else len(rest)
        counts = {
            "rollout/rounds": harvest.num_rounds,
            "rollout/carried_over": len(self._carried),
            "rollout/aborted": dropped,
            "rollout/restarted_as_stale": harvest.num_restarted,
            "rollout/zero_std/replaced": len(harvest.idle) - len(filling),
            "rollout/engine_failures": self._collector.keeper.num_failures,
            "data/stage": self._curriculum.at(harvest.step).number,
        }
        return RolloutBatch(
            groups=groups,
            num_prompts=harvest.num_prompts,
            counts=counts,
            notes=self._collector.keeper.take_notes(),
        )

    def _with_baselines(self, groups: Sequence[RolloutGroup], step: int) -> list[RolloutGroup]:
        """The groups with the rewards of their prompts' greedy responses.

        Raises:
            RewardError: too many of those failed.
        """
        job = Job(
            name=f"rollout/{step}/baseline",
            work=[begin_group(group.prompt, [0]) for group in groups],
            params=replace(self._params_at(step), temperature=0.0, top_p=1.0, top_k=0),
            schedule=self._config.schedule,
            functions="train",
            version=step - 1,
            dialogue=self._dialogue,
        )
        done = self._collector.collect(job)
        self._collector.check_rewards(done)
        return [
            replace(group, baseline=greedy.as_group(0).rollouts[0].reward)
            for group, greedy in zip(groups, done, strict=True)
        ]


def _has_zero_std(group: PartialGroup) -> bool:
    """All samples that have a grade have the same, so their advantages are zero."""
    rewards = {s.reward for s in group.samples if not isinstance(s, PartialRollout) and s.status == "ok"}
    return len(rewards) <= 1
