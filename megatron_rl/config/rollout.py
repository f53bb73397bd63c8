"""How samples are generated, and how the engine gets the policy's weights."""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_rl.config.checks import positive, require


@dataclass(frozen=True, kw_only=True)
class RolloutSection:
    """How training sequences come into being."""

    source: Literal["engine", "replay", "demonstrations"] = "engine"
    """engine: the policy's own samples; replay: those that another run has recorded, with their rewards;
    demonstrations: supervised fine-tuning."""
    replay_path: str | None = None
    """Folder rollouts/ of the run to replay."""
    engine: Literal["embedded", "vllm", "sglang"] = "embedded"
    """Inference engine; embedded needs nothing but torch, the others are installed beside it (docs/engines.md)."""
    tensor_parallel_size: int = 1
    """Neighbouring ranks that make up one engine; 1 for the embedded engine."""
    engine_options: dict[str, Any] = field(default_factory=dict)
    """Passed on to vLLM's or SGLang's own constructor, for instance gpu_memory_utilization."""
    num_prompts_per_step: int = 16
    """Prompts in each step."""
    group_size: int = 8
    """Samples of each prompt (n, num_generations)."""
    temperature: float = 1.0
    """Sampling temperature; log-probabilities are those of the tempered distribution."""
    top_p: float = 1.0
    """Nucleus sampling; 1.0 is off."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0 is off."""
    max_new_tokens: int = 1024
    """Longest response in tokens."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Token ids that end a response, besides the tokenizer's end token."""
    schedule: Literal["dynamic", "static"] = "dynamic"
    """dynamic: engines take prompts as they get free; static: a fixed split, repeatable bit for bit."""
    max_num_sequences: int = 256
    """Sequences that one engine decodes at a time."""
    over_sampling: float = 1.0
    """Prompts in work for each that the step needs; the slowest beyond those are given up, or carried over."""
    partial_rollout: bool = False
    """Carry what is given up unfinished over to the next step, which goes on with it."""
    max_staleness: int = 0
    """Policy versions that any token may be behind the one that learns from it; what is older is sampled again."""
    max_tokens_per_round: int | None = None
    """New tokens of a sample before it has to wait for the next round or step; null: all that it needs."""
    max_seconds_per_round: float | None = None
    """Seconds after which a step goes on with the groups that are complete; null: no bound."""
    dynamic_sampling: bool = False
    """Replace groups whose samples are all worth the same by those of further prompts."""
    max_rounds: int = 10
    """Rounds of sampling after which dynamic_sampling fills a step with groups without spread."""
    greedy_baseline: bool = False
    """Also answer each prompt greedily and take the reward of that from the samples' (ReMax: advantage=reinforce)."""
    async_rollout: bool = False
    """Sample the next step's groups while the policy learns from this step's."""
    environment: str | None = None
    """guess_number, or package.module:symbol: what answers the policy in problems of several turns; null: none."""
    environment_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment."""
    max_turns: int = 8
    """Responses of the policy in one conversation."""
    turn_template: str = "\n{observation}\n"
    """What stands between two responses; {observation} is what the environment said."""
    sleep_engine: bool = False
    """Engines give up the memory of weights and caches while the policy learns; weights are pushed after each step."""
    engine_timeout_s: float = 600.0
    """Seconds without any answer after which an engine in processes of its own counts as dead."""
    max_engine_failures: int = 3
    """Times that engines may die in a run and be started again; beyond it the run saves a checkpoint and stops."""
    drift_warning: float | None = 0.1
    """Mean absolute difference in nats between trainer's and engine's log-probabilities that is worth a warning."""
    drift_limit: float | None = 1.0
    """The same, at which the run stops; null: never."""

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
            "1 with rollout.engine=embedded, which holds the whole model on every rank",
        )
        require(
            self.engine != "sglang" or (self.top_p == 1 and self.top_k == 0),
            "rollout.top_p and rollout.top_k",
            (self.top_p, self.top_k),
            "1 and 0 with rollout.engine=sglang, which reports log-probabilities of the whole distribution",
        )
        require(
            self.engine != "embedded" or not self.engine_options,
            "rollout.engine_options",
            self.engine_options,
            "nothing with rollout.engine=embedded",
        )
        require(self.temperature > 0, "rollout.temperature", self.temperature, "more than 0 for training rollouts")
        require(0 < self.top_p <= 1, "rollout.top_p", self.top_p, "above 0 and at most 1")
        require(self.top_k >= 0, "rollout.top_k", self.top_k, "0 (off) or more")
        require(
            self.max_num_sequences >= self.group_size,
            "rollout.max_num_sequences",
            self.max_num_sequences,
            f"at least rollout.group_size={self.group_size}, as a group is decoded together",
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
                f"at least 1 with rollout.{name}=true, which trains on tokens of earlier policies",
            )
        require(
            "{observation}" in self.turn_template,
            "rollout.turn_template",
            repr(self.turn_template),
            "a text with {observation}",
        )
