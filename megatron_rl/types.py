"""The records that pass between rooms.

G: siblings of one prompt. R: response tokens. L: tokens of one sequence (prompt and response).
T: tokens of a micro-batch. S: sequences of a micro-batch. N: sequences of a whole step.
Stored arrays are token-aligned: index t describes token_ids[t]; only batching/align.py shifts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

FinishReason = Literal["stop", "length", "abort"]
RolloutStatus = Literal["ok", "reward_error", "reward_timeout", "environment_error"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How an engine samples."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    logprobs: bool = True
    """Log-probabilities of the sampled tokens are wanted; without them they may come as NaN."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question, tokenised, with what is needed to grade an answer to it."""

    prompt_id: str
    token_ids: Tensor
    """[P] int64."""
    text: str
    answer: str | None
    demonstration: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What an engine returns for one sample."""

    token_ids: Tensor
    """[R] int64, the stop token included when there is one."""
    logprobs: Tensor
    """[R] float32, of the distribution really sampled."""
    finish_reason: FinishReason
    policy_version: int
    routing: Tensor | None = None
    """[P + R, layers, experts per token] int16: the experts that each token of prompt and response went to; None
    unless asked for."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One graded sample."""

    token_ids: Tensor
    """[L] int64."""
    loss_mask: Tensor
    """[L] bool, True where the policy sampled the token."""
    rollout_logprobs: Tensor
    """[L] float32, 0 outside the mask."""
    text: str
    """The response as text, without special tokens."""
    finish_reason: FinishReason
    policy_versions: Tensor
    """[L] int32, of the policy that sampled each token; -1 outside the mask."""
    seed: int
    """Of its sampling."""
    reward: float
    """Weighted sum; NaN unless status is "ok"."""
    reward_parts: Mapping[str, float]
    status: RolloutStatus
    failure: str
    """Why the reward failed; empty when it did not."""
    step_rewards: Mapping[int, float] = field(default_factory=dict)
    """Parts of the reward by the token, index in the sequence, at whose turn's end they were earned; the rest came with
    the last token."""
    routing: Tensor | None = None
    """[L, layers, experts per token] int16, as the engine routed; None unless asked for."""


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """The siblings of one prompt."""

    index: int
    """Place of the prompt in the step, the same for every split over engines."""
    prompt: Prompt
    rollouts: Sequence[Rollout]
    """[G]"""
    baseline: float = 0.0
    """Taken from the rewards before they are compared: the reward of a greedy response, where one was asked for."""


@dataclass(frozen=True, kw_only=True)
class TrainSequence:
    """One sequence as the policy learns from it; all tensors are [L]."""

    token_ids: Tensor
    """int64."""
    loss_mask: Tensor
    """bool."""
    rollout_logprobs: Tensor
    """float32."""
    advantages: Tensor
    """float32."""
    loss_weights: Tensor
    """float32; their meaning is in algorithms/loss_weights.py."""
    rollout_weights: Tensor
    """float32, of the policy loss alone, as the response's importance weight; ones where responses are not weighed."""
    old_logprobs: Tensor
    """float32, by the trainer before the update."""
    ref_logprobs: Tensor
    """float32, by the reference model; zeros without one."""
    rewards: Tensor
    """float32, at the tokens that earned them."""
    values: Tensor
    """float32, what the critic expected before each token; zeros without one."""
    returns: Tensor
    """float32, what it is to expect; zeros without one."""
    routing: Tensor | None = None
    """[L, layers, experts per token] int16, to be repeated; None: the policy routes as it likes."""


@dataclass(frozen=True, kw_only=True)
class UpdatePlan:
    """One optimizer update of this rank."""

    micro_batches: Sequence[Sequence[int]]
    """Indices into TrainBatch.sequences; as many micro-batches on every data-parallel rank."""
    num_tokens: int
    """Tokens with loss in this update, over all ranks."""
    num_sequences: int
    """Sequences with loss in this update, over all ranks."""
    num_processed_tokens: int
    """All tokens of the update's sequences, prompts included, over all ranks."""
    sum_squared_lengths: int
    """Of the update's sequences, over all ranks: what attention costs."""
    imbalance: float
    """Tokens of the data-parallel rank with the most, divided by the mean."""


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """This data-parallel rank's share of one step."""

    sequences: Sequence[TrainSequence]
    updates: Sequence[UpdatePlan]
    """In order; several for mini-batches and epochs."""
    global_index: Sequence[int]
    """Place of each local sequence among the N of the step; -1 for a filler without loss."""
    rewards: Tensor
    """[N] float32, all sequences of the step; NaN where the reward failed."""
    groups: Tensor
    """[N] int64, the group of each."""
    baselines: Tensor
    """[N] float32, taken from the rewards before they are compared; NaN where the baseline's reward failed."""
    step_rewards: Sequence[Mapping[int, float]]
    """[N], of each its reward by the tokens that earned it."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward pass reads: packed [1, T] or padded [S, L] rows, already aligned to predict.

    Position t holds what concerns token t + 1, the one that it predicts.
    """

    tokens: Tensor
    """int64."""
    labels: Tensor
    """int64, the next token."""
    position_ids: Tensor
    """int64, from 0 in each sequence."""
    real: Tensor
    """bool, False where nothing but padding stands."""
    loss_mask: Tensor
    """bool."""
    loss_weights: Tensor
    """float32."""
    advantages: Tensor
    """float32."""
    rollout_logprobs: Tensor
    """float32."""
    rollout_weights: Tensor
    """float32."""
    old_logprobs: Tensor
    """float32."""
    ref_logprobs: Tensor
    """float32."""
    values: Tensor
    """float32."""
    returns: Tensor
    """float32."""
    sequence: Tensor
    """int64, the place of the position's sequence in the micro-batch."""
    cu_seqlens: tuple[int, ...] | None
    """Starts of the packed sequences and the end, [S + 1]; None when padded."""
    lengths: tuple[int, ...]
    """Tokens of each real sequence, [S]."""
    routing: Tensor | None = None
    """[1, T, layers, experts per token] or [S, L, …] int64, of the token at the position itself."""

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """The same micro-batch with every tensor replaced by what the function makes of it."""
        changed: dict[str, Any] = {n: function(v) if isinstance(v, Tensor) else v for n, v in vars(self).items()}
        return MicroBatch(**changed)


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """Where this rank stands; passed explicitly."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    dp_rank: int
    """Place among the ranks that see different sequences."""
    dp_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    vp_size: int
    """Model chunks on each pipeline rank."""
    cp_rank: int
    cp_size: int
    ep_rank: int
    ep_size: int
    etp_rank: int
    """Place among the ranks that share an expert's matrices."""
    etp_size: int
    groups: Any
    """Megatron's ProcessGroupCollection."""
    host_group: Any
    """gloo group of the whole world, for host tensors and objects."""
    store: Any
    """torch.distributed store shared by the world."""
    record: Any
    """What Megatron itself remembers of the groups; for mcore.parallel.in_layout."""

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_model_parallel_main(self) -> bool:
        """Of the ranks that share the same sequences one speaks for all."""
        return self.tp_rank == self.pp_rank == self.cp_rank == 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class TrainState:
    """Where a run stands; saved beside the weights."""

    step: int = 0
    num_prompts_consumed: int = 0
    num_updates: int = 0
    wandb_id: str | None = None
    kl_reward_coef: float | None = None
    """Weight of the KL penalty in the reward where it is adapted; None: that of the configuration."""
    reference: str | None = None
    """Folder of the reference model among the run's; None: that of the configuration."""
