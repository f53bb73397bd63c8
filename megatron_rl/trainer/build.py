"""Build the objects of a run from its configuration."""

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
from megatron_rl.mcore.runtime.parallel import build_another_layout
from megatron_rl.models import ModelSpec, read_model_spec
from megatron_rl.planning.reference import reference_placement
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.rollout.collector import Collector, CollectorLimits
from megatron_rl.rollout.engines.base import Engine, EngineSetup, engine_place, never_interrupted
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
    """Build the models of a run and load their weights."""
    policy = Policy(config, parallel)
    reference, critic, reward_model = build_reference(config, policy), None, None
    if config.algorithm.uses_critic:
        critic_config = config.for_critic()
        critic = Critic(critic_config, build_another_layout(critic_config.parallel, parallel))
    if config.reward.model is not None:
        reward_model = RewardModel(config.for_reward_model(config.reward.model.path), parallel)
    return RunModels(policy, reference, critic, reward_model)


def build_reward_model_scorer(config: RunConfig, inputs: Inputs, models: RunModels) -> RewardModelScorer | None:
    """The scorer that adds a reward model's scores to the rewards; None without ``reward.model``."""
    if config.reward.model is None or models.reward_model is None:
        return None
    return RewardModelScorer(models.reward_model, config.reward.model, StepFinder(inputs.tokenizer))


def build_reference(config: RunConfig, policy: Policy) -> Reference | None:
    """The reference model (or teacher) that computes ``ref_logprobs``; None if the run needs none."""
    path = config.algorithm.reference_path or config.model.path
    match reference_placement(config, is_alike=read_model_spec(path) == policy.spec):
        case "base":
            return AdapterFreeReference(policy)
        case "host":
            return HostReference(policy, path)
        case "device":  # its weights cannot be swapped with the policy's
            return LogProbModel(config, policy.parallel, path)
    return None


def build_engine(
    config: RunConfig,
    policy: Policy,
    suite: BenchmarkSuite | None = None,
    is_interrupted: Callable[[], bool] = never_interrupted,
) -> Engine:
    """This rank's rollout engine; collective.

    Args:
        suite: benchmarks that run on this engine too; they may need longer sequences.
        is_interrupted: polled while the engine generates; True interrupts it.
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
        max_model_len=longest if suite is None else max(longest, suite.max_sequence_length(positions)),
        local_rank=parallel.local_rank,
        timeout_s=config.rollout.engine_timeout_s,
        options=config.rollout.engine_options,
        is_interrupted=is_interrupted,
    )
    return start_engine(
        config.rollout.engine, setup, parallel, seed=config.run.seed, reports_routing=config.moe.routing_replay
    )


def longest_sequence(config: RunConfig, spec: ModelSpec) -> int:
    """Maximum length of prompt plus response, in tokens, that an engine must support."""
    new = max(config.rollout.max_new_tokens, config.validation.max_new_tokens or 0, config.weight_sync.probe_tokens)
    return min(max(config.data.max_prompt_tokens, PROBE_PROMPT) + new, spec.max_position_embeddings)


def build_supervisor(config: RunConfig, engine: Engine, policy: Policy) -> EngineSupervisor:
    """The supervisor that keeps the engines alive and at the policy's version; collective."""
    return EngineSupervisor(
        engine,
        policy.parallel,
        max_failures=config.rollout.max_engine_failures,
        push=WeightSync(policy, engine, config).push,
    )


def build_collector(config: RunConfig, inputs: Inputs, supervisor: EngineSupervisor, policy: Policy) -> Collector:
    """The collector, which generates on the engines and grades in the reward workers."""
    return Collector(
        supervisor,
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
    """The source of the training sequences: policy, demonstrations or recorded rollouts."""
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
        multi_turn=inputs.multi_turn,
        seed=config.run.seed,
        num_steps=config.run.num_steps,
        num_mini_batches=config.batching.num_mini_batches,
    )


def build_validator(config: RunConfig, inputs: Inputs, collector: Collector) -> Validator | None:
    """The evaluator of the held-out prompts; None without ``data.validation``."""
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
        multi_turn=inputs.multi_turn,
        seed=config.run.seed,
        num_samples=config.metrics.num_samples,
    )


def build_benchmark_evaluator(
    config: RunConfig, inputs: Inputs, supervisor: EngineSupervisor, policy: Policy, note: Callable[[str], None]
) -> BenchmarkEvaluator | None:
    """The evaluator of the benchmarks during a run; None without ``benchmarks.suite``."""
    if inputs.benchmarks is None:
        return None
    positions = policy.spec.max_position_embeddings
    return BenchmarkEvaluator(
        inputs.benchmarks, supervisor, config, inputs.tokenizer, policy.parallel, note, max_positions=positions
    )


def _stop_token_ids(config: RunConfig, tokenizer: Any) -> tuple[int, ...]:
    return tuple(sorted({tokenizer.eos_token_id, *config.rollout.stop_token_ids}))
