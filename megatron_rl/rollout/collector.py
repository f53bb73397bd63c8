"""Generate and grade the samples of one job on the engines of all ranks."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from megatron_rl.distributed.collectives import gather_objects, raise_together
from megatron_rl.errors import EngineDied, EngineError, Interrupted, RewardError
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.rewards.types import RewardInput, RewardResult
from megatron_rl.rollout.engines.supervisor import EngineSupervisor
from megatron_rl.rollout.load_balancing import fair_share, share
from megatron_rl.rollout.multi_turn import Conversation, MultiTurn, RolloutLimits
from megatron_rl.rollout.partial import PartialGroup, PartialRollout
from megatron_rl.rollout.request_scheduler import RequestScheduler
from megatron_rl.types import ParallelContext, Rollout, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to generate."""

    name: str
    """Different for every job of a run; the shared counters carry it."""
    work: Sequence[PartialGroup]
    params: SamplingParams
    schedule: Literal["dynamic", "static"]
    functions: str
    """The set of reward functions."""
    version: int
    """Of the policy now, whose weights an engine gets that has to be started again."""
    dialogue: MultiTurn | None = None
    """With whom the policy speaks; None: a sample is one response."""
    enough: int | None = None
    """Complete groups at which the others are given up; None: all."""
    max_tokens_now: int | None = None
    """Tokens after which a sample stays unfinished; None: no bound."""
    max_seconds: float | None = None
    """After which what is in work is given up; None: no bound."""


@dataclass(frozen=True)
class CollectorLimits:
    """When a run gives up."""

    reward_failure_fraction: float
    """Of the rewards of a step, or of an evaluation."""
    max_length: int
    """Tokens of the longest sequence."""


@dataclass(frozen=True)
class Pending:
    """A job that is generated, perhaps still."""

    job: Job
    first: "Future[_Found]"


@dataclass(frozen=True)
class _Found:
    """What one rank's engine has made."""

    samples: dict[tuple[int, int], Rollout | PartialRollout]
    """By (group, sample)."""
    death: str
    """How the engine ended; empty when it lives."""
    engine: int
    """Which one it was."""
    is_interrupted: bool = False


class WorkInterrupted(Interrupted):
    """With what was done by then."""

    def __init__(self, work: Sequence[PartialGroup]) -> None:
        super().__init__("asked to stop while responses are generated")
        self.work = work


class Collector:
    """The engine, the reward pool and the tokenizer of this rank at work on jobs of all ranks."""

    def __init__(
        self,
        keeper: EngineSupervisor,
        pool: RewardPool,
        tokenizer: Any,
        parallel: ParallelContext,
        *,
        limits: CollectorLimits,
    ) -> None:
        self.keeper = keeper
        self._engine = keeper.engine
        self._pool = pool
        self._tokenizer = tokenizer
        self._parallel = parallel
        self._limits = limits
        # which device is the present one is known thread by thread
        prepare = (lambda: torch.cuda.set_device(parallel.device)) if parallel.device.type == "cuda" else None
        self._background = ThreadPoolExecutor(max_workers=1, initializer=prepare)

    def collect(self, job: Job) -> list[PartialGroup]:
        """All groups of the job as far as they came, in order, the same on every rank; collective.

        Rewards of finished samples are computed while others are still generated. An engine that dies is started
        again, and what it had not finished is shared out again.

        Raises:
            EngineError: a prompt does not fit the engine.
            EngineDied: engines died too often.
            WorkInterrupted: on every rank, when one was asked to stop.
        """
        with raise_together(self._parallel):
            found = self._generate(job, 0)
        return self._complete(job, found)

    def begin(self, job: Job) -> Pending:
        """Begin a job in the background; the engine belongs to it until ``finish``."""
        return Pending(job, self._background.submit(self._generate, job, 0))

    def finish(self, pending: Pending, version: int) -> list[PartialGroup]:
        """What ``collect`` returns, of a job that was begun; collective.

        Args:
            version: of the policy now.
        """
        with raise_together(self._parallel):
            found = pending.first.result()
        return self._complete(replace(pending.job, version=version), found)

    def _complete(self, job: Job, found: _Found) -> list[PartialGroup]:
        """Put together what the ranks have found; what dead engines left is generated again."""
        attempt = 0
        while True:
            told = gather_objects(found, self._parallel)
            job = replace(job, work=_merged(job.work, [one.samples for one in told]))
            if any(one.is_interrupted for one in told):
                raise WorkInterrupted(job.work)
            if not any(one.death for one in told):
                break
            self.keeper.restart([(one.engine, one.death) for one in told])
            self.keeper.push(job.version)
            if _is_enough(job):
                break
            attempt += 1
            with raise_together(self._parallel):
                found = self._generate(job, attempt)
        _check_complete(job)
        return list(job.work)

    def close(self) -> None:
        """End the reward workers."""
        self._background.shutdown()
        self._pool.close()

    def _generate(self, job: Job, attempt: int) -> _Found:
        """This engine's part of the job."""
        place, store, name = self._engine.place, self._parallel.store, f"{job.name}/{attempt}"
        open_ = [index for index, group in enumerate(job.work) if not group.is_complete]
        grades: dict[tuple[int, int], tuple[Conversation, str, Future[list[RewardResult]]]] = {}

        def on_done(index: int, sample: int, conversation: Conversation) -> None:
            text = conversation.text()
            graded = self._pool.submit(job.functions, [_reward_input(conversation, text)])
            grades[index, sample] = conversation, text, graded

        desk = RequestScheduler(
            job.work,
            share(open_, job.schedule, name, place, store),
            self._rules(job),
            on_done,
            on_group=lambda: store.add(f"{name}/complete", 1),
        )
        death, is_interrupted = "", False
        limit = fair_share(sum(_num_requests(job.work[index], job) for index in open_), place)
        should_stop = self._should_stop(job, name)
        try:
            for finished in self._engine.generate(
                desk.requests(), job.params, max_requests=limit, should_stop=should_stop
            ):
                desk.take(finished)
        except EngineDied as error:
            death = str(error)
        except Interrupted:
            is_interrupted = True
        samples: dict[tuple[int, int], Rollout | PartialRollout] = {
            place: conversation.rollout(text, graded.result()[0])
            for place, (conversation, text, graded) in grades.items()
        }
        samples |= {place: conversation.sample for place, conversation in desk.unfinished.items()}
        return _Found(samples, death, place.index, is_interrupted)

    def _rules(self, job: Job) -> RolloutLimits:
        return RolloutLimits(
            max_new_tokens=job.params.max_new_tokens,
            max_tokens_now=job.max_tokens_now,
            max_length=self._limits.max_length,
            dialogue=job.dialogue,
            encode=lambda text: self._tokenizer.encode(text, add_special_tokens=False),
            decode=lambda ids: self._tokenizer.decode(ids, skip_special_tokens=True),
        )

    def _should_stop(self, job: Job, name: str) -> Callable[[], bool] | None:
        """Whether the groups are enough, or the time is over; None when neither matters."""
        if job.enough is None and job.max_seconds is None:
            return None
        begun = sum(group.is_complete for group in job.work)
        deadline = float("inf") if job.max_seconds is None else time.monotonic() + job.max_seconds

        def should_stop() -> bool:
            if time.monotonic() > deadline:
                return True
            if job.enough is None:
                return False
            return begun + self._parallel.store.add(f"{name}/complete", 0) >= job.enough

        return should_stop

    def check_rewards(self, work: Sequence[PartialGroup]) -> None:
        """Hold the failed rewards of a step, or of an evaluation, against the limit.

        Raises:
            RewardError: too many failed.
        """
        rollouts = [sample for group in work for sample in group.samples if isinstance(sample, Rollout)]
        failed = [rollout for rollout in rollouts if rollout.status != "ok"]
        limit = self._limits.reward_failure_fraction
        if len(failed) > limit * len(rollouts):
            raise RewardError(
                f"{len(failed)} of {len(rollouts)} rewards failed, more than reward.max_failure_fraction="
                f"{limit}. First: {failed[0].status}: {failed[0].failure}. "
                "Mend the reward function, or raise the limit."
            )


def _merged(
    work: Sequence[PartialGroup], found: Sequence[dict[tuple[int, int], Rollout | PartialRollout]]
) -> list[PartialGroup]:
    """The work with what the ranks have made of it."""
    made = {place: sample for part in found for place, sample in part.items()}
    return [
        replace(group, samples=tuple(made.get((index, i), sample) for i, sample in enumerate(group.samples)))
        for index, group in enumerate(work)
    ]


def _num_requests(group: PartialGroup, job: Job) -> int:
    """That may be in work for a group at a time."""
    open_ = [sample for sample in group.samples if isinstance(sample, PartialRollout)]
    if job.dialogue is not None:
        return len(open_)
    return sum(bool(sample.parts) for sample in open_) + any(not sample.parts for sample in open_)


def _check_complete(job: Job) -> None:
    """
    Raises:
        EngineError: an engine gave up samples although nobody asked it to.
    """
    missing = sum(not group.is_complete for group in job.work)
    may_stop = job.enough is not None or job.max_seconds is not None or job.max_tokens_now is not None
    if missing and not may_stop:
        raise EngineError(f"the engine gave up samples of {missing} prompts without being asked to. See its own log.")


def _is_enough(job: Job) -> bool:
    wanted = len(job.work) if job.enough is None else job.enough
    return sum(group.is_complete for group in job.work) >= wanted


def _reward_input(conversation: Conversation, text: str) -> RewardInput:
    prompt = conversation.prompt
    assert conversation.finish_reason is not None
    return RewardInput(
        prompt=prompt.text,
        response=text,
        answer=prompt.answer,
        finish_reason=conversation.finish_reason,
        num_tokens=conversation.sample.num_sampled,
        seed=conversation.sample.seed,
        metadata=prompt.metadata,
    )
