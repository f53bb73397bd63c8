"""Samplers: where the sequences of a step come from."""

from typing import Any, Protocol

import torch

from megatron_rl.config.rollout import RolloutSection
from megatron_rl.data.prompts import PromptOrder
from megatron_rl.data.templates import tokenize
from megatron_rl.errors import DataError
from megatron_rl.rollout.collect import Collector, Job
from megatron_rl.rollout.sampling import sample_seed
from megatron_rl.types import Prompt, Rollout, RolloutGroup, SamplingParams


class Sampler(Protocol):
    """Yields the groups of a step."""

    @property
    def uses_engine(self) -> bool:
        """The engine must hold the current weights before ``collect``."""
        ...

    def collect(self, step: int, num_prompts_consumed: int) -> list[RolloutGroup]:
        """All groups of a step, the same on every rank; collective."""
        ...


class EngineSampler:
    """The policy's own samples, graded."""

    uses_engine = True

    def __init__(
        self, config: RolloutSection, order: PromptOrder, collector: Collector, params: SamplingParams, *, seed: int
    ) -> None:
        self._config = config
        self._order = order
        self._collector = collector
        self._params = params
        self._seed = seed

    def collect(self, step: int, num_prompts_consumed: int) -> list[RolloutGroup]:
        count, size = self._config.num_prompts_per_step, self._config.group_size
        job = Job(
            name=f"rollout/{step}",
            prompts=self._order.take(num_prompts_consumed, count),
            seeds=[tuple(sample_seed(self._seed, step, index, k) for k in range(size)) for index in range(count)],
            params=self._params,
            schedule=self._config.schedule,
            functions="train",
        )
        return self._collector.collect(job)


class DemonstrationSampler:
    """Demonstrations to imitate: every prompt with the response of its row."""

    uses_engine = False

    def __init__(self, config: RolloutSection, order: PromptOrder, tokenizer: Any) -> None:
        self._config = config
        self._order = order
        self._tokenizer = tokenizer

    def collect(self, step: int, num_prompts_consumed: int) -> list[RolloutGroup]:
        prompts = self._order.take(num_prompts_consumed, self._config.num_prompts_per_step)
        texts = [_demonstration(prompt) for prompt in prompts]
        responses = tokenize(texts, self._tokenizer, special_tokens=False)
        return [
            RolloutGroup(
                index=index,
                prompt=prompt,
                rollouts=[self._rollout(prompt, text, response)],
            )
            for index, (prompt, text, response) in enumerate(zip(prompts, texts, responses, strict=True))
        ]

    def _rollout(self, prompt: Prompt, text: str, response: list[int]) -> Rollout:
        ids = torch.tensor([*response, self._tokenizer.eos_token_id])
        if ids.numel() > self._config.max_new_tokens:
            raise DataError(
                f"the demonstration of prompt {prompt.prompt_id} has {ids.numel()} tokens with its end token, "
                f"more than rollout.max_new_tokens={self._config.max_new_tokens}. "
                "Raise the limit, or leave such rows out."
            )
        token_ids = torch.cat([prompt.token_ids, ids])
        mask = torch.arange(token_ids.numel()) >= prompt.token_ids.numel()
        return Rollout(
            token_ids=token_ids,
            loss_mask=mask,
            rollout_logprobs=torch.zeros(token_ids.numel()),
            text=text,
            finish_reason="stop",
            policy_version=-1,
            reward=0.0,
            reward_parts={},
            status="ok",
            failure="",
        )


def _demonstration(prompt: Prompt) -> str:
    if prompt.demonstration is None:
        raise DataError(f"prompt {prompt.prompt_id} has no demonstration. Set data.train.demonstration_field.")
    return prompt.demonstration
