"""What a step of a configuration computes."""

from dataclasses import dataclass
from math import ceil

from megatron_rl.config.schema import RunConfig
from megatron_rl.config.validate import sequences_per_step


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Sequences of a step and how long they are."""

    num_prompts: int
    group_size: int
    num_sequences: int
    """That the step learns from."""
    longest_prompt: int
    longest_response: int
    mean_prompt: float
    """Tokens; an assumption."""
    mean_response: float
    """Tokens; an assumption."""
    num_mini_batches: int
    """Optimizer updates of a step, epochs not counted."""

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
    """The workload of a configuration.

    Args:
        mean_prompt, mean_response: tokens; None: a quarter and a half of the longest.
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
    """How an update is cut on one data-parallel rank."""

    tokens: int
    """Of the largest, on one context-parallel rank, padding counted in."""
    count: int
    """Of them in an update."""


def micro_batches_of(config: RunConfig, workload: Workload, dp_size: int, *, longest: bool) -> MicroBatches:
    """The micro-batches of an update.

    Args:
        dp_size: data-parallel ranks.
        longest: for memory: every sequence is as long as it may be, and the fullest micro-batch is full; otherwise
            all have the mean length, for time.
    """
    cp, batching = config.parallel.context_parallel_size, config.batching
    length = float(workload.longest if longest else workload.mean)
    mine = ceil(workload.sequences_per_update / dp_size)
    full = batching.max_tokens_per_micro_batch * cp
    room = max(1, int(full // length))
    if batching.micro_batch_size is not None:
        room = min(room, batching.micro_batch_size)
    count = ceil(mine / room)
    tokens = ceil(mine / count) * length
    if longest and batching.micro_batch_size is None:
        tokens = max(length, min(full, mine * length))  # shorter sequences fill up what the longest leave
    if config.parallel.virtual_pipeline_parallel_size > 1:
        stages = config.parallel.pipeline_parallel_size
        count = ceil(count / stages) * stages
    return MicroBatches(tokens=ceil(tokens / cp), count=count)
