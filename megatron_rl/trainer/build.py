"""Configuration to objects. With loop.py and train.py the only place that sees the whole RunConfig."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rl.config import RunConfig
from megatron_rl.evaluation.in_training import BenchmarkEvaluator, BenchmarkSuite
from megatron_rl.evaluation.validation import Validator
from megatron_rl.mcore.critic import Critic
from megatron_rl.mcore.logprob_model import LogProbModel
from megatron_rl.mcore.policy import Policy
from megatron_rl.mcore.reference import AdapterFreeReference, HostReference
from megatron_rl.mcore.reward_model import RewardModel
from megatron_rl.mcore.runtime.parallel import split_again
from megatron_rl.models import ModelSpec, read_model_spec
from megatron_rl.planning.reference import place_of_reference
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.rollout.collector import Collector, CollectorLimits
from megatron_rl.rollout.engines.base import Engine, EngineSetup, engine_place, never
from megatron_rl.rollout.engines.start import start_engine
from megatron_rl.rollout.engines.supervisor import EngineSupervisor
from megatron_rl.rollout.policy_source import PolicySource
from megatron_rl.rollout.replay_source import ReplaySource
from megatron_rl.rollout.source import DemonstrationSource, RolloutSource
from megatron_rl.trainer.inputs import Inputs
from megatron_rl.trainer.models import Reference, RunModels
from megatron_rl.trainer.preflight import reward_functions
from megatron_rl.trainer.reward_scores import RewardModelScorer, StepFinder
from megatron_rl.types import ParallelContext, SamplingParams
from megatron_rl.weight_sync import WeightSync
from megatron_rl.weight_sync.push import PROBE_PROMPT
from megatron_rl.weights.hf_files import torch_dtype


def build_models(config: RunConfig, parallel: ParallelContext) -> RunModels:
    """The models of a run, their weights read."""
    policy = Policy(config, parallel)
    reference, critic, reward_model = build_reference(config, policy), None, None
    if config.algorithm.uses_critic:
        own = config.for_critic()
        critic = Critic(own, split_again(own.parallel, parallel))
    if config.reward.model is not None:
        reward_model = RewardModel(config.for_reward_model(config.reward.model.path), parallel)
    return RunModels(policy, reference, critic, reward_model)


def build_reward_model_scorer(config: RunConfig, inputs: Inputs, models: RunModels) -> RewardModelScorer | None:
    """What adds a reward model's scores; None without one."""
    if config.reward.model is None or models.reward_model is None:
        return None
    return RewardModelScorer(models.reward_model, config.reward.model, StepFinder(inputs.tokenizer))


def build_reference(config: RunConfig, policy: Policy) -> Reference | None:
    """The model that the KL divergence is taken to; None when its coefficients are 0."""
    path = config.algorithm.reference_path or config.model.path
    match place_of_reference(config, is_alike=read_model_spec(path) == policy.spec):
        case "base":
            return AdapterFreeReference(policy)
        case "host":
            return HostReference(policy, path)
        case "device":  # cannot take the policy's place
            return LogProbModel(config, policy.parallel, path)
    return None


def build_engine(
    config: RunConfig, policy: Policy, suite: BenchmarkSuite | None = None, is_interrupted: Callable[[], bool] = never
) -> Engine:
    """This rank's rollout engine; collective.

    Args:
        suite: of benchmarks that it answers as well.
        is_interrupted: asked all the time while it generates.
    """
    parallel, positions = policy.parallel, policy.spec.max_position_embeddings
    longest = longest_sequence(config, policy.spec)
    setup = EngineSetup(
        folder=config.model.path,
        spec=policy.spec,
        place=engine_place(parallel, config.rollout.tensor_parallel_size),
        device=parallel.device,
        dtype=torch_dtype(config.model.dtype),
        max_num_sequences=config.rollout.max_num_sequences,
        max_model_len=longest if suite is None else max(longest, suite.longest(positions)),
        local_rank=parallel.local_rank,
        timeout_s=config.rollout.engine_timeout_s,
        options=config.rollout.engine_options,
        is_interrupted=is_interrupted,
    )
    return start_engine(
        config.rollout.engine, setup, parallel, seed=config.run.seed, reports_routing=config.moe.routing_replay
    )


def longest_sequence(config: RunConfig, spec: ModelSpec) -> int:
    """Tokens of prompt and response that an engine must be ready for."""
    new = max(config.rollout.max_new_tokens, config.validation.max_new_tokens or 0, config.weight_sync.probe_tokens)
    return min(max(config.data.max_prompt_tokens, PROBE_PROMPT) + new, spec.max_position_embeddings)


def build_supervisor(config: RunConfig, engine: Engine, policy: Policy) -> EngineSupervisor:
    """Who keeps the engines at the policy's version; collective."""
    return EngineSupervisor(
        engine,
        policy.parallel,
        max_failures=config.rollout.max_engine_failures,
        push=WeightSync(policy, engine, config).push,
    )


def build_collector(config: RunConfig, inputs: Inputs, keeper: EngineSupervisor, policy: Policy) -> Collector:
    """Engine, reward workers and tokenizer together."""
    return Collector(
        keeper,
        RewardPool(config.reward, reward_functions(config)),
        inputs.tokenizer,
        policy.parallel,
        limits=CollectorLimits(
            reward_failure_fraction=config.reward.max_failure_fraction,
            max_length=longest_sequence(config, policy.spec),
        ),
    )


def build_rollout_source(
    config: RunConfig, inputs: Inputs, collector: Collector, parallel: ParallelContext
) -> RolloutSource:
    """Where training sequences come from."""
    if config.rollout.source == "demonstrations":
        return DemonstrationSource(config.rollout, inputs.curriculum, inputs.tokenizer)
    if config.rollout.replay_path is not None:
        return ReplaySource(Path(config.rollout.replay_path), parallel)
    params = SamplingParams(
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        max_new_tokens=config.rollout.max_new_tokens,
        stop_token_ids=_stop_token_ids(config, inputs.tokenizer),
    )
    return PolicySource(
        config.rollout,
        inputs.curriculum,
        collector,
        params,
        dialogue=inputs.multi_turn,
        seed=config.run.seed,
        num_steps=config.run.num_steps,
        num_mini_batches=config.batching.num_mini_batches,
    )


def build_validator(config: RunConfig, inputs: Inputs, collector: Collector) -> Validator | None:
    """Held-out evaluation; None without held-out prompts."""
    if inputs.validation is None:
        return None
    params = SamplingParams(
        temperature=config.validation.temperature,
        top_p=1.0,
        top_k=0,
        max_new_tokens=config.validation.max_new_tokens or config.rollout.max_new_tokens,
        stop_token_ids=_stop_token_ids(config, inputs.tokenizer),
    )
    return Validator(
        collector,
        inputs.validation.prompts[: config.validation.num_prompts],
        params,
        dialogue=inputs.multi_turn,
        seed=config.run.seed,
        num_samples=config.metrics.num_samples,
    )


def build_benchmark_evaluator(
    config: RunConfig, inputs: Inputs, keeper: EngineSupervisor, policy: Policy, note: Callable[[str], None]
) -> BenchmarkEvaluator | None:
    """Benchmarks during the run; None without a suite."""
    if inputs.benchmarks is None:
        return None
    positions = policy.spec.max_position_embeddings
    return BenchmarkEvaluator(
        inputs.benchmarks, keeper, config, inputs.tokenizer, policy.parallel, note, positions=positions
    )


def _stop_token_ids(config: RunConfig, tokenizer: Any) -> tuple[int, ...]:
    return tuple(sorted({tokenizer.eos_token_id, *config.rollout.stop_token_ids}))
