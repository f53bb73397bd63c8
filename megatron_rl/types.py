"""The records that packages of this project exchange.

Shapes: G: samples (siblings) of one prompt. P: prompt tokens. R: response tokens. L: tokens of one sequence (prompt and
response). T: tokens of a micro-batch. S: sequences of a micro-batch. N: sequences of a whole step.
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
    """Sampling parameters of an engine."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    logprobs: bool = True
    """Whether to return the log-probabilities of the sampled tokens; if False they may be NaN."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One tokenised prompt, with the data that is needed to grade a response to it."""

    prompt_id: str
    token_ids: Tensor
    """[P] int64."""
    text: str
    answer: str | None
    """The reference answer; None if there is none."""
    demonstration: str | None = None
    """The response to imitate in supervised fine-tuning; None if there is none."""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The response that an engine returns for one sample."""

    token_ids: Tensor
    """[R] int64, including the stop token if there is one."""
    logprobs: Tensor
    """[R] float32, under the distribution that was sampled from."""
    finish_reason: FinishReason
    policy_version: int
    routing: Tensor | None = None
    """[P + R, layers, experts per token] int16, the experts of each token of prompt and response; None unless
    requested."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One graded response with its prompt."""

    token_ids: Tensor
    """[L] int64."""
    loss_mask: Tensor
    """[L] bool, True at tokens that the policy sampled."""
    rollout_logprobs: Tensor
    """[L] float32, the engine's log-probabilities; 0 outside the mask."""
    text: str
    """The response as text, without special tokens."""
    finish_reason: FinishReason
    policy_versions: Tensor
    """[L] int32, version of the policy that sampled each token; -1 outside the mask."""
    seed: int
    """Random seed of the sampling."""
    reward: float
    """Total reward, the weighted sum of the parts; NaN unless status is "ok"."""
    reward_parts: Mapping[str, float]
    """Name of a reward function -> its value."""
    status: RolloutStatus
    failure: str
    """Why the reward failed; empty if it did not."""
    step_rewards: Mapping[int, float] = field(default_factory=dict)
    """Index of a token in the sequence -> part of the reward that is earned there, at the end of a turn or reasoning
    step; the rest of the reward is earned at the last token."""
    routing: Tensor | None = None
    """[L, layers, experts per token] int16, the experts that the engine used; None unless requested."""


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """The rollouts of one prompt."""

    index: int
    """Index of the prompt in the step; does not depend on how prompts are distributed over engines."""
    prompt: Prompt
    rollouts: Sequence[Rollout]
    """[G]"""
    baseline: float = 0.0
    """Subtracted from the rewards before advantages are computed: the reward of a greedy response with
    ``rollout.greedy_baseline``, else 0."""


@dataclass(frozen=True, kw_only=True)
class TrainSequence:
    """One training sequence; all tensors are [L] unless noted."""

    token_ids: Tensor
    """int64."""
    loss_mask: Tensor
    """bool."""
    rollout_logprobs: Tensor
    """float32."""
    advantages: Tensor
    """float32."""
    loss_weights: Tensor
    """float32, weights of the token losses (see algorithms/loss_weights.py)."""
    rollout_weights: Tensor
    """float32, importance weight of the response, a factor of the policy loss only; 1 without rollout correction of
    responses."""
    old_logprobs: Tensor
    """float32, the trainer's log-probabilities before the update."""
    ref_logprobs: Tensor
    """float32, log-probabilities under the reference model; zeros without one."""
    rewards: Tensor
    """float32, at the tokens that earned them."""
    values: Tensor
    """float32, the critic's values before each token; zeros without a critic."""
    returns: Tensor
    """float32, the critic's targets; zeros without a critic."""
    routing: Tensor | None = None
    """[L, layers, experts per token] int16, the experts to use (routing replay); None: the router decides."""


@dataclass(frozen=True, kw_only=True)
class UpdatePlan:
    """One optimizer update of this rank."""

    micro_batches: Sequence[Sequence[int]]
    """Indices into TrainBatch.sequences; every data-parallel rank has the same number of micro-batches."""
    num_tokens: int
    """Number of tokens with loss in this update, over all ranks."""
    num_sequences: int
    """Number of sequences with loss in this update, over all ranks."""
    num_processed_tokens: int
    """Number of all tokens of the update's sequences, including prompts, over all ranks."""
    sum_squared_lengths: int
    """Sum of the squared lengths of the update's sequences, over all ranks; proportional to the cost of attention."""
    imbalance: float
    """Largest number of tokens on a data-parallel rank, divided by the mean."""


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """This data-parallel rank's share of one step."""

    sequences: Sequence[TrainSequence]
    updates: Sequence[UpdatePlan]
    """Optimizer updates in order, one per mini-batch and epoch."""
    global_index: Sequence[int]
    """Index of each local sequence among the N of the step; -1 for a filler sequence without loss."""
    rewards: Tensor
    """[N] float32, rewards of all sequences of the step; NaN where the reward failed."""
    groups: Tensor
    """[N] int64, the group of each sequence."""
    baselines: Tensor
    """[N] float32, subtracted from the rewards before advantages are computed; NaN where the baseline's reward
    failed."""
    step_rewards: Sequence[Mapping[int, float]]
    """[N], for each sequence, index of a token -> reward that is earned there."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Inputs of one forward pass, packed [1, T] or padded [S, L], shifted to predictions.

    Labels, masks and values per token at position t are those of token t + 1, which the position predicts.
    """

    tokens: Tensor
    """int64."""
    labels: Tensor
    """int64, the next token."""
    position_ids: Tensor
    """int64, starting at 0 in each sequence."""
    real: Tensor
    """bool, False at padding."""
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
    """int64, index in the micro-batch of the sequence of each position."""
    cu_seqlens: tuple[int, ...] | None
    """Start of each packed sequence and the end of the last, [S + 1]; None if padded."""
    lengths: tuple[int, ...]
    """Number of tokens of each sequence, without padding, [S]."""
    routing: Tensor | None = None
    """[1, T, layers, experts per token] or [S, L, …] int64, experts of the token at the position itself."""

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """Return the micro-batch with the function applied to every tensor."""
        changed: dict[str, Any] = {n: function(v) if isinstance(v, Tensor) else v for n, v in vars(self).items()}
        return MicroBatch(**changed)


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """Ranks, sizes and process groups of this process in the parallel layout; passed explicitly, never global."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    dp_rank: int
    """Data-parallel rank: index among the ranks that process different sequences."""
    dp_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    vp_size: int
    """Number of model chunks on each pipeline rank."""
    cp_rank: int
    cp_size: int
    ep_rank: int
    ep_size: int
    etp_rank: int
    """Expert-tensor-parallel rank: index among the ranks that an expert's matrices are split over."""
    etp_size: int
    groups: Any
    """Megatron's ProcessGroupCollection."""
    host_group: Any
    """gloo group of all ranks, for host tensors and objects."""
    store: Any
    """torch.distributed store shared by all ranks."""
    record: Any
    """Megatron's own global state of the groups; for mcore.runtime.parallel.in_layout."""

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the last pipeline stage."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_model_parallel_main(self) -> bool:
        """Whether this rank represents the ranks that process the same sequences (TP, PP and CP rank 0)."""
        return self.tp_rank == self.pp_rank == self.cp_rank == 0

    @property
    def is_main(self) -> bool:
        """Whether this is the first rank of the world."""
        return self.rank == 0


@dataclass(frozen=True)
class TrainState:
    """Progress of a run; saved in every checkpoint."""

    step: int = 0
    """Number of finished steps."""
    num_prompts_consumed: int = 0
    """Number of prompts taken from the training data."""
    num_updates: int = 0
    """Number of optimizer updates of the policy."""
    wandb_id: str | None = None
    """Weights & Biases run id; None without one."""
    kl_reward_coef: float | None = None
    """Current coefficient of the adaptive KL penalty in the reward; None: that of the configuration."""
    reference: str | None = None
    """Name of the reference model's folder in references/ of the run folder; None: that of the configuration."""
