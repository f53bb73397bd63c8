"""Workload of a step: the number and lengths of its sequences."""

from dataclasses import dataclass
from math import ceil

from megatron_rl.config.schema import RunConfig
from megatron_rl.config.validate import sequences_per_step


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Number and lengths of the sequences of a step."""

    num_prompts: int
    group_size: int
    num_sequences: int
    """Sequences that the step trains on."""
    longest_prompt: int
    longest_response: int
    mean_prompt: float
    """Assumed mean, in tokens."""
    mean_response: float
    """Assumed mean, in tokens."""
    num_mini_batches: int
    """Optimizer updates per epoch of a step."""

    @property
    def longest(self) -> int:
        return self.longest_prompt + self.longest_response

    @property
    def mean(self) -> float:
        return self.mean_prompt + self.mean_response

    @property
    def sequences_per_update(self) -> int:
        return max(1, self.num_sequences // self.num_mini_batches)


def workload_of(config: RunConfig, *, mean_prompt: float | None = None, mean_response: float | None = None) -> Workload:
    """Return the workload of a configuration.

    Args:
        mean_prompt, mean_response: mean lengths in tokens; None: a quarter of the longest prompt, half of the longest
            response.
    """
    rollout = config.rollout
    return Workload(
        num_prompts=rollout.num_prompts_per_step,
        group_size=rollout.group_size if rollout.source != "demonstrations" else 1,
        num_sequences=sequences_per_step(config),
        longest_prompt=config.data.max_prompt_tokens,
        longest_response=rollout.max_new_tokens,
        mean_prompt=config.data.max_prompt_tokens / 4 if mean_prompt is None else mean_prompt,
        mean_response=rollout.max_new_tokens / 2 if mean_response is None else mean_response,
        num_mini_batches=config.batching.num_mini_batches,
    )


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """Micro-batches of an update on one data-parallel rank."""

    tokens: int
    """Tokens of the largest micro-batch on one context-parallel rank, padding included."""
    count: int
    """Micro-batches per update."""


def micro_batches_of(config: RunConfig, workload: Workload, dp_size: int, *, longest: bool) -> MicroBatches:
    """Return the micro-batches of an update.

    Args:
        dp_size: number of data-parallel ranks.
        longest: True to estimate memory: every sequence has the maximum length, and the fullest micro-batch is full.
            False to estimate time: every sequence has the mean length.
    """
    cp, batching = config.parallel.context_parallel_size, config.batching
    length = float(workload.longest if longest else workload.mean)
    num_sequences = ceil(workload.sequences_per_update / dp_size)
    max_tokens = batching.max_tokens_per_micro_batch * cp
    per_micro_batch = max(1, int(max_tokens // length))
    if batching.micro_batch_size is not None:
        per_micro_batch = min(per_micro_batch, batching.micro_batch_size)
    count = ceil(num_sequences / per_micro_batch)
    tokens = ceil(num_sequences / count) * length
    if longest and batching.micro_batch_size is None:
        # shorter sequences fill the space that the longest leave
        tokens = max(length, min(max_tokens, num_sequences * length))
    if config.parallel.virtual_pipeline_parallel_size > 1:
        stages = config.parallel.pipeline_parallel_size
        count = ceil(count / stages) * stages
    return MicroBatches(tokens=ceil(tokens / cp), count=count)
