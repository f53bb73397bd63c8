"""Generate and grade one list of prompts on the engines of all ranks."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from megatron_rl.collective import gather_objects, raise_together
from megatron_rl.errors import RewardError
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.rewards.record import RewardInput, RewardResult
from megatron_rl.rollout.engine import Engine, Request
from megatron_rl.rollout.queue import fair_share, share
from megatron_rl.types import Completion, ParallelContext, Prompt, Rollout, RolloutGroup, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to generate."""

    name: str
    """Different for every job of a run; the shared counter carries it."""
    prompts: Sequence[Prompt]
    seeds: Sequence[tuple[int, ...]]
    """The seeds of every prompt's samples."""
    params: SamplingParams
    schedule: Literal["dynamic", "static"]
    functions: str
    """The set of reward functions."""


class Collector:
    """The engine, the reward pool and the tokenizer of this rank at work on jobs of all ranks."""

    def __init__(
        self,
        engine: Engine,
        pool: RewardPool,
        tokenizer: Any,
        parallel: ParallelContext,
        *,
        max_failure_fraction: float,
    ) -> None:
        self._engine = engine
        self._pool = pool
        self._tokenizer = tokenizer
        self._parallel = parallel
        self._max_failure_fraction = max_failure_fraction

    def collect(self, job: Job) -> list[RolloutGroup]:
        """All groups of the job in the order of its prompts, the same on every rank; collective.

        Rewards of finished samples are computed while others are still generated.

        Raises:
            EngineError: a prompt does not fit the engine.
            RewardError: too large a share of the rewards failed.
        """
        with raise_together(self._parallel):
            mine = self._generate(job)
        groups = [group for part in gather_objects(mine, self._parallel) for group in part]
        groups.sort(key=lambda group: group.index)
        self._check_failures(groups)
        return groups

    def close(self) -> None:
        """End the reward workers."""
        self._pool.close()

    def _generate(self, job: Job) -> list[RolloutGroup]:
        requests = [
            Request(key=index, token_ids=prompt.token_ids, seeds=seeds)
            for index, (prompt, seeds) in enumerate(zip(job.prompts, job.seeds, strict=True))
        ]
        place = self._engine.place
        mine = share(requests, job.schedule, job.name, place, self._parallel.store)
        done: dict[int, dict[int, tuple[Completion, str]]] = {}
        grades: dict[int, Future[list[RewardResult]]] = {}
        limit = fair_share(len(requests), place)
        for finished in self._engine.generate(mine, job.params, max_requests=limit):
            siblings = done.setdefault(finished.key, {})
            text = self._tokenizer.decode(finished.completion.token_ids, skip_special_tokens=True)
            siblings[finished.sample] = (finished.completion, text)
            if len(siblings) == len(job.seeds[finished.key]):
                samples = [_reward_input(job, finished.key, i, *siblings[i]) for i in range(len(siblings))]
                grades[finished.key] = self._pool.submit(job.functions, samples)
        return [
            RolloutGroup(
                index=key,
                prompt=job.prompts[key],
                rollouts=[
                    _rollout(job.prompts[key], *done[key][i], result) for i, result in enumerate(grades[key].result())
                ],
            )
            for key in done
        ]

    def _check_failures(self, groups: Sequence[RolloutGroup]) -> None:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        failed = [rollout for rollout in rollouts if rollout.status != "ok"]
        if len(failed) > self._max_failure_fraction * len(rollouts):
            raise RewardError(
                f"{len(failed)} of {len(rollouts)} rewards failed, more than reward.max_failure_fraction="
                f"{self._max_failure_fraction}. First: {failed[0].status}: {failed[0].failure}. "
                "Mend the reward function, or raise the limit."
            )


def _reward_input(job: Job, key: int, sample: int, completion: Completion, text: str) -> RewardInput:
    prompt = job.prompts[key]
    return RewardInput(
        prompt=prompt.text,
        response=text,
        answer=prompt.answer,
        finish_reason=completion.finish_reason,
        num_tokens=completion.token_ids.numel(),
        seed=job.seeds[key][sample],
        metadata=prompt.metadata,
    )


def _rollout(prompt: Prompt, completion: Completion, text: str, result: RewardResult) -> Rollout:
    token_ids, num_prompt = torch.cat([prompt.token_ids, completion.token_ids]), prompt.token_ids.numel()
    return Rollout(
        token_ids=token_ids,
        loss_mask=torch.arange(token_ids.numel()) >= num_prompt,
        rollout_logprobs=F.pad(completion.logprobs, (num_prompt, 0)),
        text=text,
        finish_reason=completion.finish_reason,
        policy_version=completion.policy_version,
        reward=result.total,
        reward_parts=result.parts,
        status=result.status,
        failure=result.message,
        routing=completion.routing,
    )
