"""The samples of a step on their way: what is finished, and how far the others have come."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_rl.types import Completion, Prompt, Rollout, RolloutGroup


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What an environment said in between."""

    token_ids: Tensor
    """[O] int64."""


Part = Completion | Observation


@dataclass(frozen=True, kw_only=True)
class PartialRollout:
    """A sample that is not done: perhaps not begun, perhaps cut short and to be gone on with."""

    seed: int
    parts: tuple[Part, ...] = ()
    """In order; those sampled by one policy version together."""

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy has sampled."""
        return sum(part.token_ids.numel() for part in self.parts if isinstance(part, Completion))

    @property
    def oldest_version(self) -> int | None:
        """Of the policies that sampled it; None before it is begun."""
        return min((part.policy_version for part in self.parts if isinstance(part, Completion)), default=None)

    def with_part(self, part: Part) -> "PartialRollout":
        return replace(self, parts=(*self.parts, part))


@dataclass(frozen=True, kw_only=True)
class PartialGroup:
    """A prompt and its samples."""

    prompt: Prompt
    samples: tuple[Rollout | PartialRollout, ...]
    """[G]; a rollout is finished and graded."""

    @property
    def is_complete(self) -> bool:
        """Every sample is finished."""
        return all(isinstance(sample, Rollout) for sample in self.samples)

    def as_group(self, index: int) -> RolloutGroup:
        """The siblings of a complete group."""
        rollouts = [sample for sample in self.samples if isinstance(sample, Rollout)]
        return RolloutGroup(index=index, prompt=self.prompt, rollouts=rollouts)

    def fresh_enough(self, oldest: int) -> "PartialGroup":
        """The same with every sample begun anew that has a token of a policy before ``oldest``."""
        return replace(self, samples=tuple(_fresh_enough(sample, oldest) for sample in self.samples))


def begin_group(prompt: Prompt, seeds: Sequence[int]) -> PartialGroup:
    """A group of which nothing is sampled."""
    return PartialGroup(prompt=prompt, samples=tuple(PartialRollout(seed=seed) for seed in seeds))


def oldest_version(rollout: Rollout) -> int | None:
    """Of the policies that sampled it; None when its environment failed before the first token."""
    return min(rollout.policy_versions[rollout.loss_mask].tolist(), default=None)


def _fresh_enough(sample: Rollout | PartialRollout, oldest: int) -> Rollout | PartialRollout:
    version = oldest_version(sample) if isinstance(sample, Rollout) else sample.oldest_version
    return PartialRollout(seed=sample.seed) if version is not None and version < oldest else sample


def all_tokens(prompt: Prompt, sample: PartialRollout) -> Tensor:
    """[L] int64: prompt, responses and observations so far."""
    return torch.cat([prompt.token_ids, *(part.token_ids for part in sample.parts)])
