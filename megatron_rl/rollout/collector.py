"""Generation and grading of the samples of a job on the engines of all ranks."""

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
    """The samples to generate, and how."""

    name: str
    """Unique among the jobs of a run; part of the names of the shared counters."""
    groups: Sequence[PartialGroup]
    """The same on every rank."""
    params: SamplingParams
    schedule: Literal["dynamic", "static"]
    functions: str
    """Name of the set of reward functions."""
    version: int
    """Current policy version; an engine that is restarted receives its weights."""
    multi_turn: MultiTurn | None = None
    """Environment of multi-turn rollouts; None: a sample is one response."""
    num_groups_needed: int | None = None
    """Number of complete groups after which the others are aborted; None: no group is aborted."""
    max_tokens_per_round: int | None = None
    """New tokens after which a sample stays unfinished; None: no limit."""
    max_seconds: float | None = None
    """Seconds after which the unfinished samples are aborted; None: no limit."""


@dataclass(frozen=True)
class CollectorLimits:
    """Limits that apply to all jobs of a run."""

    reward_failure_fraction: float
    """Largest allowed fraction of failed rewards in a step or an evaluation."""
    max_length: int
    """Tokens of the longest sequence."""


@dataclass(frozen=True)
class Pending:
    """A job that was started in the background and may still be running."""

    job: Job
    future: "Future[_EngineResult]"
    """Result of this rank's engine in the first attempt."""


@dataclass(frozen=True)
class _EngineResult:
    """The samples that this rank's engine generated in one attempt at a job."""

    samples: dict[tuple[int, int], Rollout | PartialRollout]
    """By (group index, sample index)."""
    death: str
    """Why the engine died; empty if it is alive."""
    engine: int
    """Index of the engine."""
    is_interrupted: bool = False


class JobInterrupted(Interrupted):
    """A stop was requested during a job; ``groups`` holds the progress so far."""

    def __init__(self, groups: Sequence[PartialGroup]) -> None:
        super().__init__("a stop was requested while responses were generated")
        self.groups = groups


class Collector:
    """Runs jobs on the engines and reward pools of all ranks; every rank has one."""

    def __init__(
        self,
        supervisor: EngineSupervisor,
        pool: RewardPool,
        tokenizer: Any,
        parallel: ParallelContext,
        *,
        limits: CollectorLimits,
    ) -> None:
        self.supervisor = supervisor
        self._engine = supervisor.engine
        self._pool = pool
        self._tokenizer = tokenizer
        self._parallel = parallel
        self._limits = limits
        # the current CUDA device is a setting of each thread
        prepare = (lambda: torch.cuda.set_device(parallel.device)) if parallel.device.type == "cuda" else None
        self._background = ThreadPoolExecutor(max_workers=1, initializer=prepare)

    def collect(self, job: Job) -> list[PartialGroup]:
        """Run a job and return all of its groups in order, complete or not, the same on every rank; collective.

        Rewards of finished samples are computed while others are still generated. An engine that dies is restarted,
        and its unfinished samples are distributed over all engines again.

        Raises:
            EngineError: a prompt does not fit the engine.
            EngineDied: engines died too often.
            JobInterrupted: on every rank, if a stop was requested on any rank.
        """
        with raise_together(self._parallel):
            result = self._generate(job, 0)
        return self._complete(job, result)

    def begin(self, job: Job) -> Pending:
        """Start a job in the background; nothing else may use the engine until ``finish``."""
        return Pending(job, self._background.submit(self._generate, job, 0))

    def finish(self, pending: Pending, version: int) -> list[PartialGroup]:
        """Wait for a job that was started in the background and return what ``collect`` returns; collective.

        Args:
            version: current policy version.
        """
        with raise_together(self._parallel):
            result = pending.future.result()
        return self._complete(replace(pending.job, version=version), result)

    def _complete(self, job: Job, result: _EngineResult) -> list[PartialGroup]:
        """Merge the results of all ranks; generate again what engines that died left unfinished."""
        attempt = 0
        while True:
            results = gather_objects(result, self._parallel)
            job = replace(job, groups=_merged(job.groups, [result.samples for result in results]))
            if any(result.is_interrupted for result in results):
                raise JobInterrupted(job.groups)
            if not any(result.death for result in results):
                break
            self.supervisor.restart([(result.engine, result.death) for result in results])
            self.supervisor.push(job.version)
            if _is_enough(job):
                break
            attempt += 1
            with raise_together(self._parallel):
                result = self._generate(job, attempt)
        _check_complete(job)
        return list(job.groups)

    def close(self) -> None:
        """Stop the background thread and the reward workers."""
        self._background.shutdown()
        self._pool.close()

    def _generate(self, job: Job, attempt: int) -> _EngineResult:
        """Generate and grade this engine's share of the job."""
        place, store, name = self._engine.place, self._parallel.store, f"{job.name}/{attempt}"
        open_ = [index for index, group in enumerate(job.groups) if not group.is_complete]
        done: dict[tuple[int, int], tuple[Conversation, str, Future[list[RewardResult]]]] = {}

        def on_done(index: int, sample: int, conversation: Conversation) -> None:
            text = conversation.text()
            reward = self._pool.submit(job.functions, [_reward_input(conversation, text)])
            done[index, sample] = conversation, text, reward

        scheduler = RequestScheduler(
            job.groups,
            share(open_, job.schedule, name, place, store),
            self._rollout_limits(job),
            on_done,
            on_group_done=lambda: store.add(f"{name}/complete", 1),
        )
        death, is_interrupted = "", False
        limit = fair_share(sum(_num_requests(job.groups[index], job) for index in open_), place)
        should_stop = self._should_stop(job, name)
        try:
            for finished in self._engine.generate(
                scheduler.requests(), job.params, max_requests=limit, should_stop=should_stop
            ):
                scheduler.take(finished)
        except EngineDied as error:
            death = str(error)
        except Interrupted:
            is_interrupted = True
        samples: dict[tuple[int, int], Rollout | PartialRollout] = {
            key: conversation.rollout(text, reward.result()[0]) for key, (conversation, text, reward) in done.items()
        }
        samples |= {key: conversation.sample for key, conversation in scheduler.unfinished.items()}
        return _EngineResult(samples, death, place.index, is_interrupted)

    def _rollout_limits(self, job: Job) -> RolloutLimits:
        return RolloutLimits(
            max_new_tokens=job.params.max_new_tokens,
            max_tokens_per_round=job.max_tokens_per_round,
            max_length=self._limits.max_length,
            multi_turn=job.multi_turn,
            encode=lambda text: self._tokenizer.encode(text, add_special_tokens=False),
            decode=lambda ids: self._tokenizer.decode(ids, skip_special_tokens=True),
        )

    def _should_stop(self, job: Job, name: str) -> Callable[[], bool] | None:
        """Return a test for "enough groups are complete or the time is over"; None if the job has neither limit."""
        if job.num_groups_needed is None and job.max_seconds is None:
            return None
        num_complete_before = sum(group.is_complete for group in job.groups)
        deadline = float("inf") if job.max_seconds is None else time.monotonic() + job.max_seconds

        def should_stop() -> bool:
            if time.monotonic() > deadline:
                return True
            if job.num_groups_needed is None:
                return False
            return num_complete_before + self._parallel.store.add(f"{name}/complete", 0) >= job.num_groups_needed

        return should_stop

    def check_rewards(self, groups: Sequence[PartialGroup]) -> None:
        """Compare the number of failed rewards in a step or an evaluation with the limit.

        Raises:
            RewardError: too many rewards failed.
        """
        rollouts = [sample for group in groups for sample in group.samples if isinstance(sample, Rollout)]
        failed = [rollout for rollout in rollouts if rollout.status != "ok"]
        limit = self._limits.reward_failure_fraction
        if len(failed) > limit * len(rollouts):
            raise RewardError(
                f"{len(failed)} of {len(rollouts)} rewards failed, more than reward.max_failure_fraction="
                f"{limit}. First: {failed[0].status}: {failed[0].failure}. "
                "Fix the reward function or raise the limit."
            )


def _merged(
    groups: Sequence[PartialGroup], samples_of_ranks: Sequence[dict[tuple[int, int], Rollout | PartialRollout]]
) -> list[PartialGroup]:
    """Return the groups with their samples replaced by those that the ranks generated."""
    generated = {key: sample for samples in samples_of_ranks for key, sample in samples.items()}
    return [
        replace(group, samples=tuple(generated.get((index, i), sample) for i, sample in enumerate(group.samples)))
        for index, group in enumerate(groups)
    ]


def _num_requests(group: PartialGroup, job: Job) -> int:
    """Number of requests of a group that may be in progress at a time."""
    open_ = [sample for sample in group.samples if isinstance(sample, PartialRollout)]
    if job.multi_turn is not None:
        return len(open_)
    return sum(bool(sample.parts) for sample in open_) + any(not sample.parts for sample in open_)


def _check_complete(job: Job) -> None:
    """Check that all groups are complete, unless the job has a limit that may leave some incomplete.

    Raises:
        EngineError: an engine aborted samples although no stop was requested.
    """
    missing = sum(not group.is_complete for group in job.groups)
    may_stop = job.num_groups_needed is not None or job.max_seconds is not None or job.max_tokens_per_round is not None
    if missing and not may_stop:
        raise EngineError(
            f"the engine aborted samples of {missing} prompts although no stop was requested. See the engine's own log."
        )


def _is_enough(job: Job) -> bool:
    num_needed = len(job.groups) if job.num_groups_needed is None else job.num_groups_needed
    return sum(group.is_complete for group in job.groups) >= num_needed


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
