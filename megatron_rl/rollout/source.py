"""The protocol of rollout sources, and the source for supervised fine-tuning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from megatron_rl.config.rollout import RolloutSection
from megatron_rl.data.curriculum import Curriculum
from megatron_rl.data.templates import tokenize
from megatron_rl.errors import DataError
from megatron_rl.rollout.partial import PartialGroup
from megatron_rl.types import Prompt, Rollout, RolloutGroup


@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """The rollout groups of one step."""

    groups: Sequence[RolloutGroup]
    """The same on every rank."""
    num_prompts: int
    """Prompts that this step took from the data."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the generation, by metric name."""
    notes: Sequence[str] = ()
    """Messages for the user."""


class RolloutSource(Protocol):
    """Provides the rollout groups of every step."""

    @property
    def uses_engine(self) -> bool:
        """Whether the engine must hold the current weights before ``collect``."""
        ...

    @property
    def has_rewards(self) -> bool:
        """Whether the rollouts have rewards; those without are used for supervised fine-tuning."""
        ...

    def drain(self, version: int) -> None:
        """Wait until the engine is idle, so that it can receive weights or serve other requests; collective.

        Args:
            version: current policy version.
        """
        ...

    def collect(self, step: int, num_prompts_consumed: int) -> RolloutBatch:
        """Return all groups of a step; collective.

        Args:
            step: number of the step, from 1.
            num_prompts_consumed: prompts that the previous steps took from the data.
        """
        ...

    def in_flight(self) -> Sequence[PartialGroup]:
        """Return the groups that a checkpoint must keep for later steps, the same on every rank."""
        ...

    def resume(self, in_flight: Sequence[PartialGroup]) -> None:
        """Continue with the groups that ``in_flight`` returned before the checkpoint."""
        ...


class DemonstrationSource:
    """Rollout source for supervised fine-tuning: each prompt with the demonstration from its data row."""

    uses_engine = False
    has_rewards = False

    def __init__(self, config: RolloutSection, curriculum: Curriculum, tokenizer: Any) -> None:
        self._config = config
        self._curriculum = curriculum
        self._tokenizer = tokenizer

    def drain(self, version: int) -> None:
        pass

    def in_flight(self) -> Sequence[PartialGroup]:
        return ()

    def resume(self, in_flight: Sequence[PartialGroup]) -> None:
        pass

    def collect(self, step: int, num_prompts_consumed: int) -> RolloutBatch:
        order = self._curriculum.at(step).order
        prompts = order.take(num_prompts_consumed, self._config.num_prompts_per_step)
        texts = [_demonstration(prompt) for prompt in prompts]
        responses = tokenize(texts, self._tokenizer, special_tokens=False)
        groups = [
            RolloutGroup(
                index=index,
                prompt=prompt,
                rollouts=[self._rollout(prompt, text, response)],
            )
            for index, (prompt, text, response) in enumerate(zip(prompts, texts, responses, strict=True))
        ]
        return RolloutBatch(groups=groups, num_prompts=len(groups))

    def _rollout(self, prompt: Prompt, text: str, response: list[int]) -> Rollout:
        ids = torch.tensor([*response, self._tokenizer.eos_token_id])
        if ids.numel() > self._config.max_new_tokens:
            raise DataError(
                f"the demonstration of prompt {prompt.prompt_id} has {ids.numel()} tokens including the end token, "
                f"more than rollout.max_new_tokens={self._config.max_new_tokens}. "
                "Raise the limit, or remove such rows from the data."
            )
        token_ids = torch.cat([prompt.token_ids, ids])
        mask = torch.arange(token_ids.numel()) >= prompt.token_ids.numel()
        return Rollout(
            token_ids=token_ids,
            loss_mask=mask,
            rollout_logprobs=torch.zeros(token_ids.numel()),
            text=text,
            finish_reason="stop",
            policy_versions=torch.full_like(token_ids, -1).int(),
            seed=0,
            reward=0.0,
            reward_parts={},
            status="ok",
            failure="",
        )


def _demonstration(prompt: Prompt) -> str:
    if prompt.demonstration is None:
        raise DataError(f"prompt {prompt.prompt_id} has no demonstration. Set data.train.demonstration_field.")
    return prompt.demonstration
