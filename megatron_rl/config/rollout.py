"""Configuration of rollouts: source, engine, sampling, long tails, environments."""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_rl.config.checks import positive, require


@dataclass(frozen=True, kw_only=True)
class RolloutSection:
    """How the sequences of a step are generated."""

    source: Literal["engine", "replay", "demonstrations"] = "engine"
    """Source of the training sequences. engine: responses that the policy samples; replay: rollouts that another run
    has recorded, with their rewards; demonstrations: supervised fine-tuning on a column of the data."""
    replay_path: str | None = None
    """Folder rollouts/ of the run to replay, with rollout.source=replay; null otherwise."""
    engine: Literal["embedded", "vllm", "sglang"] = "embedded"
    """Inference engine. embedded: part of this package, needs only torch; vllm, sglang: installed separately
    (docs/engines.md)."""
    tensor_parallel_size: int = 1
    """Adjacent ranks that form one engine (tensor parallelism of the engine); 1 with engine=embedded."""
    engine_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments passed to the constructor of vLLM or SGLang, for instance gpu_memory_utilization."""
    num_prompts_per_step: int = 16
    """Prompts (groups) per step (verl's train_batch_size, slime's rollout_batch_size)."""
    group_size: int = 8
    """Responses sampled for each prompt (verl's n, TRL's num_generations)."""
    temperature: float = 1.0
    """Sampling temperature; log-probabilities are those of the distribution at this temperature."""
    top_p: float = 1.0
    """Nucleus sampling: probability mass to sample from; 1.0 is off."""
    top_k: int = 0
    """Sample from the k most likely tokens only; 0 is off."""
    max_new_tokens: int = 1024
    """Longest response, in tokens; in a conversation, of all responses together (verl's max_response_length, TRL's
    max_completion_length)."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Ids of tokens that end a response, in addition to the tokenizer's end-of-sequence token."""
    schedule: Literal["dynamic", "static"] = "dynamic"
    """Distribution of prompts over engines. dynamic: an engine takes the next prompt when it has a free slot; static: a
    fixed split, whose results are reproducible bit for bit."""
    max_num_sequences: int = 256
    """Largest number of sequences that one engine decodes at a time (vLLM's max_num_seqs)."""
    over_sampling: float = 1.0
    """Over-sampling: prompts started per prompt that the step needs, 1 or more; once enough groups are complete the
    others are aborted, or carried over with partial_rollout (slime's over_sampling_batch_size)."""
    partial_rollout: bool = False
    """Partial rollout: carry unfinished responses over to the next step, which continues them, instead of aborting
    them (slime's partial_rollout); needs max_staleness of 1 or more."""
    max_staleness: int = 0
    """Largest staleness of a token: policy versions between the one that sampled it and the one that trains on it;
    responses with older tokens are sampled again."""
    max_tokens_per_round: int | None = None
    """New tokens per response and round of sampling; a response that needs more waits for the next round or step. null:
    no limit."""
    max_seconds_per_round: float | None = None
    """Time limit of a round of sampling, in seconds; the step then continues with the groups that are complete. null:
    no limit."""
    dynamic_sampling: bool = False
    """Dynamic sampling (DAPO): replace groups whose rewards are all equal (zero std) by groups of further prompts
    (verl's filter_groups)."""
    max_rounds: int = 10
    """Rounds of sampling per step after which dynamic_sampling stops replacing zero-std groups and fills the step with
    them (verl's max_num_gen_batches)."""
    greedy_baseline: bool = False
    """Also generate a greedy response to each prompt and subtract its reward from those of the samples (ReMax, with
    algorithm.advantage=reinforce)."""
    async_rollout: bool = False
    """Asynchronous rollout: generate the groups of the next step while the policy is trained on those of this step (one
    step off-policy); needs max_staleness of 1 or more."""
    environment: str | None = None
    """Environment that replies to the policy in multi-turn conversations: guess_number, or package.module:symbol; null:
    none, every prompt has one response."""
    environment_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment."""
    max_turns: int = 8
    """Largest number of the policy's responses in one conversation (verl's max_assistant_turns)."""
    turn_template: str = "\n{observation}\n"
    """Text that is inserted between two responses of a conversation; {observation} is the environment's reply."""
    sleep_engine: bool = False
    """Sleep mode: engines free the memory of weights and KV caches while the policy is trained (verl's
    free_cache_engine); weights are pushed after every step."""
    engine_timeout_s: float = 600.0
    """Seconds without a reply after which an engine in processes of its own counts as dead."""
    max_engine_failures: int = 3
    """Number of engine failures in a run after which engines are restarted; at the next one the run saves a checkpoint
    and stops."""
    drift_warning: float | None = 0.1
    """Log-prob mismatch, the mean absolute difference between the log-probabilities of trainer and engine in nats, from
    which the run prints a warning; null: never."""
    drift_limit: float | None = 1.0
    """Log-prob mismatch, the mean absolute difference between the log-probabilities of trainer and engine in nats, at
    which the run stops; null: never."""

    def __post_init__(self) -> None:
        positive("rollout", self, "num_prompts_per_step", "group_size", "max_new_tokens", "max_num_sequences")
        positive("rollout", self, "tensor_parallel_size")
        self._check_long_tails()
        for name, limit in (("drift_warning", self.drift_warning), ("drift_limit", self.drift_limit)):
            require(limit is None or limit > 0, f"rollout.{name}", limit, "null, or more than 0")
        require(
            self.engine != "embedded" or self.tensor_parallel_size == 1,
            "rollout.tensor_parallel_size",
            self.tensor_parallel_size,
            "1 with rollout.engine=embedded, which has the whole model on every rank",
        )
        require(
            self.engine != "sglang" or (self.top_p == 1 and self.top_k == 0),
            "rollout.top_p and rollout.top_k",
            (self.top_p, self.top_k),
            "1 and 0 with rollout.engine=sglang, which reports log-probabilities of the distribution without top-p and "
            "top-k",
        )
        require(
            self.engine != "embedded" or not self.engine_options,
            "rollout.engine_options",
            self.engine_options,
            "no options with rollout.engine=embedded",
        )
        require(self.temperature > 0, "rollout.temperature", self.temperature, "more than 0 for training rollouts")
        require(0 < self.top_p <= 1, "rollout.top_p", self.top_p, "above 0 and at most 1")
        require(self.top_k >= 0, "rollout.top_k", self.top_k, "0 (off) or more")
        require(
            self.max_num_sequences >= self.group_size,
            "rollout.max_num_sequences",
            self.max_num_sequences,
            f"at least rollout.group_size={self.group_size}, because a group is decoded together",
        )

    def _check_long_tails(self) -> None:
        positive("rollout", self, "max_tokens_per_round", "max_rounds", "max_turns")
        require(self.over_sampling >= 1, "rollout.over_sampling", self.over_sampling, "1 or more")
        require(self.max_staleness >= 0, "rollout.max_staleness", self.max_staleness, "0 or more")
        require(self.max_engine_failures >= 0, "rollout.max_engine_failures", self.max_engine_failures, "0 or more")
        require(self.engine_timeout_s > 0, "rollout.engine_timeout_s", self.engine_timeout_s, "more than 0 seconds")
        seconds = self.max_seconds_per_round
        require(seconds is None or seconds > 0, "rollout.max_seconds_per_round", seconds, "null, or more than 0")
        for name, is_on in (("partial_rollout", self.partial_rollout), ("async_rollout", self.async_rollout)):
            require(
                not is_on or self.max_staleness >= 1,
                "rollout.max_staleness",
                self.max_staleness,
                f"at least 1 with rollout.{name}=true, which trains on tokens of earlier policy versions",
            )
        require(
            "{observation}" in self.turn_template,
            "rollout.turn_template",
            repr(self.turn_template),
            "a text with {observation}",
        )
