"""Partial groups: the finished and unfinished samples of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_rl.types import Completion, Prompt, Rollout, RolloutGroup


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Tokens of an environment's reply between two responses of the policy."""

    token_ids: Tensor
    """[O] int64."""


Part = Completion | Observation


@dataclass(frozen=True, kw_only=True)
class PartialRollout:
    """A sample that is not finished: either not started, or interrupted and to be continued."""

    seed: int
    parts: tuple[Part, ...] = ()
    """Completions and observations in order; each completion was sampled by one policy version."""

    @property
    def num_sampled(self) -> int:
        """Number of tokens that the policy has sampled so far."""
        return sum(part.token_ids.numel() for part in self.parts if isinstance(part, Completion))

    @property
    def oldest_version(self) -> int | None:
        """Oldest policy version that sampled part of it; None if nothing is sampled yet."""
        return min((part.policy_version for part in self.parts if isinstance(part, Completion)), default=None)

    def with_part(self, part: Part) -> "PartialRollout":
        """Return a copy with ``part`` appended."""
        return replace(self, parts=(*self.parts, part))


@dataclass(frozen=True, kw_only=True)
class PartialGroup:
    """A prompt and its samples, finished or not."""

    prompt: Prompt
    samples: tuple[Rollout | PartialRollout, ...]
    """[G]; a Rollout is finished and graded."""

    @property
    def is_complete(self) -> bool:
        """Whether every sample is finished."""
        return all(isinstance(sample, Rollout) for sample in self.samples)

    def as_group(self, index: int) -> RolloutGroup:
        """Return a complete group as a RolloutGroup."""
        rollouts = [sample for sample in self.samples if isinstance(sample, Rollout)]
        return RolloutGroup(index=index, prompt=self.prompt, rollouts=rollouts)

    def restart_stale(self, oldest_allowed: int) -> "PartialGroup":
        """Reset every sample that contains a token of a policy version before ``oldest_allowed``."""
        return replace(self, samples=tuple(_restart_if_stale(sample, oldest_allowed) for sample in self.samples))


def begin_group(prompt: Prompt, seeds: Sequence[int]) -> PartialGroup:
    """Return a group with one sample per seed, none of them started."""
    return PartialGroup(prompt=prompt, samples=tuple(PartialRollout(seed=seed) for seed in seeds))


def oldest_version(rollout: Rollout) -> int | None:
    """Oldest policy version that sampled a token of it; None if its environment failed before the first token."""
    return min(rollout.policy_versions[rollout.loss_mask].tolist(), default=None)


def _restart_if_stale(sample: Rollout | PartialRollout, oldest_allowed: int) -> Rollout | PartialRollout:
    version = oldest_version(sample) if isinstance(sample, Rollout) else sample.oldest_version
    return PartialRollout(seed=sample.seed) if version is not None and version < oldest_allowed else sample


def all_tokens(prompt: Prompt, sample: PartialRollout) -> Tensor:
    """[L] int64, the tokens of the prompt and of all responses and observations so far."""
    return torch.cat([prompt.token_ids, *(part.token_ids for part in sample.parts)])
