"""Configuration to objects. With loop.py and train.py the only place that sees the whole RunConfig."""

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_rl.algorithms.advantages import ADVANTAGES, TOKEN_ADVANTAGES, distillation_advantages, process_advantages
from megatron_rl.algorithms.objective import build_objective
from megatron_rl.collective import gather_objects, raise_together
from megatron_rl.config import RunConfig, validate
from megatron_rl.config.load import flatten
from megatron_rl.config.lora import LoraSection
from megatron_rl.config.reward_training import RewardTrainingConfig
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.config.schema import RewardFunctionSection
from megatron_rl.data.curriculum import Curriculum
from megatron_rl.data.prompts import PromptSet, load_prompts
from megatron_rl.data.templates import load_tokenizer
from megatron_rl.environments import build_environment
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.examiner import Examiner, Suite, read_suite
from megatron_rl.judging import Judge, StepFinder
from megatron_rl.mcore.critic import Critic
from megatron_rl.mcore.model import check_weights
from megatron_rl.mcore.optimizer import check_optimizer
from megatron_rl.mcore.parallel import split_again
from megatron_rl.mcore.policy import Policy
from megatron_rl.mcore.precision import Implementation, choose_implementation
from megatron_rl.mcore.quantized import BLOCK
from megatron_rl.mcore.reference import BaseReference, HostedReference
from megatron_rl.mcore.reward_model import RewardModel, check_scores
from megatron_rl.mcore.scoring import ScoringModel
from megatron_rl.mcore.settings import transformer_config
from megatron_rl.metrics.console import Console, SilentConsole, build_console
from megatron_rl.metrics.sinks import JsonlSink, Sink, TensorboardSink, WandbSink
from megatron_rl.models import ModelSpec, read_model_spec
from megatron_rl.models.engine_shards import check_engine_size
from megatron_rl.models.flops import peak_tflops
from megatron_rl.models.lora import ATTENTION_TARGETS, adapted_matrices, lora_table
from megatron_rl.planning.reference import place_of_reference
from megatron_rl.plugins import load_symbol
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.rewards.registry import build_grader
from megatron_rl.rollout.collect import Collector, CollectorLimits
from megatron_rl.rollout.conversation import Dialogue
from megatron_rl.rollout.engine import Engine, EngineSetup, engine_place, never
from megatron_rl.rollout.engine_sampler import EngineSampler
from megatron_rl.rollout.engines.start import start_engine
from megatron_rl.rollout.evaluator import Evaluator
from megatron_rl.rollout.keeper import EngineKeeper
from megatron_rl.rollout.replay import ReplaySampler
from megatron_rl.rollout.sampler import DemonstrationSampler, Sampler
from megatron_rl.run_folder import RunFolder
from megatron_rl.run_models import Reference, RunModels
from megatron_rl.types import ParallelContext, SamplingParams, TrainState
from megatron_rl.weight_sync import WeightSync
from megatron_rl.weight_sync.push import PROBE_PROMPT
from megatron_rl.weights.hf_files import torch_dtype
from megatron_rl.weights.layout import hf_shapes
from megatron_rl.weights.peft_files import PeftReader


class Inputs:
    """What a run reads: tokenizer and prompts. Reading it checks everything that needs no model."""

    def __init__(self, config: RunConfig, world_size: int) -> None:
        """
        Raises:
            ConfigError, DataError, ConversionError: whatever is wrong with configuration, data or model files.
        """
        validate(config, world_size)
        spec = read_model_spec(config.model.path)
        implementation = choose_implementation(config)
        check_optimizer(config)
        self.dialogue = build_dialogue(config.rollout)
        if config.moe.routing_replay and spec.moe is None:
            raise ConfigError(f"moe.routing_replay=true: {spec.family} has no experts. Set it to false.")
        if config.profiling.memory_snapshot and not torch.cuda.is_available():
            raise ConfigError("profiling.memory_snapshot=true needs a GPU. Set it to false.")
        transformer_config(spec, config, implementation)
        check_engine_size(spec, config.rollout.tensor_parallel_size)
        check_weights(spec, config.model.path)
        if config.algorithm.uses_reference and config.algorithm.reference_path is not None:
            reference = read_model_spec(config.algorithm.reference_path)
            transformer_config(reference, config, implementation)
            check_weights(reference, config.algorithm.reference_path)
            if config.algorithm.reference_reset_every and reference != spec:
                raise ConfigError(
                    f"algorithm.reference_reset_every={config.algorithm.reference_reset_every}, but the model of "
                    f"algorithm.reference_path={config.algorithm.reference_path} is not of the policy's architecture "
                    "and cannot take its weights. Set it to 0, or use a reference of the same architecture."
                )
            if reference.vocab_size != spec.vocab_size:
                raise ConfigError(
                    f"algorithm.reference_path={config.algorithm.reference_path} has {reference.vocab_size} "
                    f"tokens, the policy {spec.vocab_size}. The reference must share the policy's tokenizer."
                )
        _check_lora(config.lora, spec, config.parallel.tensor_parallel_size)
        if config.algorithm.uses_critic:
            _check_value_model(config.of_critic(), config.model.path, implementation, "critic.path")
        if config.reward.model is not None:
            own = config.of_reward_model(config.reward.model.path)
            _check_value_model(own, config.model.path, implementation, "reward.model.path")
            check_scores(own.model.path)
        for functions in reward_functions(config).values():
            build_grader(functions)
        build_objective(config.algorithm)
        known = {
            **ADVANTAGES,
            **TOKEN_ADVANTAGES,
            "process": process_advantages,
            "distillation": distillation_advantages,
        }
        load_symbol(config.algorithm.advantage, known, "algorithm.advantage")
        self.tokenizer = load_tokenizer(config.model.path)
        self.train: PromptSet = load_prompts(config.data.train, config.data, self.tokenizer)
        self.curriculum = build_curriculum(config, self.train)
        self.evaluation: PromptSet | None = None
        if config.data.evaluation is not None:
            self.evaluation = load_prompts(config.data.evaluation, config.data, self.tokenizer)
        for prompts in (self.train, self.evaluation):
            if prompts is not None:
                _check_fits(prompts, spec, config)
        self.suite = read_suite(config, self.tokenizer)
        if self.suite is not None:
            self.suite.longest(spec.max_position_embeddings)  # before anything is built


def _check_lora(config: LoraSection, spec: ModelSpec, tp_size: int) -> None:
    if not config.rank:
        return
    if config.quantize != "none" and spec.moe is not None:
        raise ConfigError(
            f"lora.quantize={config.quantize}: the experts of {spec.family}, nearly all of its weights, would not be "
            "quantised. Set lora.quantize=none."
        )
    for name, one in adapted_matrices(spec).items():
        columns = one.columns // (1 if one.splits_rows else tp_size)
        if config.quantize != "none" and columns % BLOCK:
            raise ConfigError(
                f"lora.quantize={config.quantize}: {name} has {columns} columns on each rank, which do not divide by "
                f"{BLOCK}, those that share a scale. Lower parallel.tensor_parallel_size, or set lora.quantize=none."
            )
    unknown = [target for target in config.targets if target not in adapted_matrices(spec)]
    if unknown:
        raise ConfigError(
            f"lora.targets={config.targets}: adapters beside the experts of {spec.family} are not supported. "
            f"Set lora.targets=[{','.join(ATTENTION_TARGETS)}]."
        )
    if config.path is not None:
        shapes = hf_shapes(lora_table(spec, config.rank, config.targets))
        PeftReader(config.path, shapes, rank=config.rank, alpha=config.alpha)


def _check_value_model(config: RunConfig, policy: str, implementation: Implementation, key: str) -> None:
    """Everything about a model of one output that needs no model.

    Args:
        config: with it in the policy's place.
        policy: folder of the policy.
        key: that names its folder.
    """
    spec, theirs, path = read_model_spec(config.model.path), read_model_spec(policy), config.model.path
    transformer_config(spec, config, implementation)
    check_optimizer(config)
    check_weights(spec, path, "value")
    vocabulary = load_tokenizer(policy).get_vocab()
    if max(vocabulary.values()) >= spec.vocab_size or load_tokenizer(path).get_vocab() != vocabulary:
        raise ConfigError(
            f"{key}={path} has {spec.vocab_size} tokens, the policy {theirs.vocab_size}, and other ones. "
            "It must share the policy's tokenizer."
        )
    if spec.max_position_embeddings < theirs.max_position_embeddings:
        raise ConfigError(
            f"{key}={path} has {spec.max_position_embeddings} positions, fewer than the policy's "
            f"{theirs.max_position_embeddings}. Choose a model that can read all that the policy can write."
        )


def _check_fits(prompts: PromptSet, spec: ModelSpec, config: RunConfig) -> None:
    longest = max(prompt.token_ids.numel() for prompt in prompts.prompts)
    new = max(config.rollout.max_new_tokens, config.evaluation.max_new_tokens or 0)
    if longest + new > spec.max_position_embeddings:
        raise ConfigError(
            f"the longest prompt has {longest} tokens; with rollout.max_new_tokens={new} that is more than the model's "
            f"{spec.max_position_embeddings} positions. Lower rollout.max_new_tokens or data.max_prompt_tokens."
        )
    largest = max(int(prompt.token_ids.max()) for prompt in prompts.prompts)
    if largest >= spec.vocab_size:
        raise DataError(
            f"the tokenizer gives token id {largest}, the model has {spec.vocab_size} tokens. "
            "Tokenizer and model do not belong together."
        )


def read_inputs(config: RunConfig, parallel: ParallelContext) -> Inputs:
    """The inputs of a run; every rank raises when one of them finds something wrong."""
    with raise_together(parallel):
        return Inputs(config, parallel.world_size)


def build_models(config: RunConfig, parallel: ParallelContext) -> RunModels:
    """The models of a run, their weights read."""
    policy = Policy(config, parallel)
    reference, critic, reward_model = build_reference(config, policy), None, None
    if config.algorithm.uses_critic:
        own = config.of_critic()
        critic = Critic(own, split_again(own.parallel, parallel))
    if config.reward.model is not None:
        reward_model = RewardModel(config.of_reward_model(config.reward.model.path), parallel)
    return RunModels(policy, reference, critic, reward_model)


def build_judge(config: RunConfig, inputs: Inputs, models: RunModels) -> Judge | None:
    """What adds a reward model's scores; None without one."""
    if config.reward.model is None or models.reward_model is None:
        return None
    return Judge(models.reward_model, config.reward.model, StepFinder(inputs.tokenizer))


def build_reference(config: RunConfig, policy: Policy) -> Reference | None:
    """The model that the KL divergence is taken to; None when its coefficients are 0."""
    path = config.algorithm.reference_path or config.model.path
    match place_of_reference(config, is_alike=read_model_spec(path) == policy.spec):
        case "base":
            return BaseReference(policy)
        case "host":
            return HostedReference(policy, path)
        case "device":  # cannot take the policy's place
            return ScoringModel(config, policy.parallel, path)
    return None


def build_dialogue(config: RolloutSection) -> Dialogue | None:
    """With whom the policy speaks; None without an environment."""
    if config.environment is None:
        return None
    environment = build_environment(config.environment, config.environment_options)
    return Dialogue(environment=environment, max_turns=config.max_turns, template=config.turn_template)


def build_engine(
    config: RunConfig, policy: Policy, suite: Suite | None = None, is_interrupted: Callable[[], bool] = never
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
    new = max(config.rollout.max_new_tokens, config.evaluation.max_new_tokens or 0, config.weight_sync.probe_tokens)
    return min(max(config.data.max_prompt_tokens, PROBE_PROMPT) + new, spec.max_position_embeddings)


def build_keeper(config: RunConfig, engine: Engine, policy: Policy) -> EngineKeeper:
    """Who keeps the engines at the policy's version; collective."""
    return EngineKeeper(
        engine,
        policy.parallel,
        max_failures=config.rollout.max_engine_failures,
        push=WeightSync(policy, engine, config).push,
    )


def build_collector(config: RunConfig, inputs: Inputs, keeper: EngineKeeper, policy: Policy) -> Collector:
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


def build_curriculum(config: RunConfig, prompts: PromptSet) -> Curriculum:
    """Which prompts there are at which step."""
    return Curriculum(prompts.prompts, config.data, max_new_tokens=config.rollout.max_new_tokens, seed=config.run.seed)


def build_sampler(config: RunConfig, inputs: Inputs, collector: Collector, parallel: ParallelContext) -> Sampler:
    """Where training sequences come from."""
    if config.rollout.source == "demonstrations":
        return DemonstrationSampler(config.rollout, inputs.curriculum, inputs.tokenizer)
    if config.rollout.replay_path is not None:
        return ReplaySampler(Path(config.rollout.replay_path), parallel)
    params = SamplingParams(
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        max_new_tokens=config.rollout.max_new_tokens,
        stop_token_ids=_stop_token_ids(config, inputs.tokenizer),
    )
    return EngineSampler(
        config.rollout,
        inputs.curriculum,
        collector,
        params,
        dialogue=inputs.dialogue,
        seed=config.run.seed,
        num_steps=config.run.num_steps,
        num_updates=config.batching.num_updates,
    )


def build_evaluator(config: RunConfig, inputs: Inputs, collector: Collector) -> Evaluator | None:
    """Held-out evaluation; None without held-out prompts."""
    if inputs.evaluation is None:
        return None
    params = SamplingParams(
        temperature=config.evaluation.temperature,
        top_p=1.0,
        top_k=0,
        max_new_tokens=config.evaluation.max_new_tokens or config.rollout.max_new_tokens,
        stop_token_ids=_stop_token_ids(config, inputs.tokenizer),
    )
    return Evaluator(
        collector,
        inputs.evaluation.prompts[: config.evaluation.num_prompts],
        params,
        dialogue=inputs.dialogue,
        seed=config.run.seed,
        num_samples=config.metrics.num_samples,
    )


def build_examiner(
    config: RunConfig, inputs: Inputs, keeper: EngineKeeper, policy: Policy, note: Callable[[str], None]
) -> Examiner | None:
    """Benchmarks during the run; None without a suite."""
    if inputs.suite is None:
        return None
    positions = policy.spec.max_position_embeddings
    return Examiner(inputs.suite, keeper, config, inputs.tokenizer, policy.parallel, note, positions=positions)


def reward_functions(config: RunConfig) -> dict[str, Sequence[RewardFunctionSection]]:
    """The named sets of reward functions."""
    return {"train": config.reward.functions, "evaluation": config.evaluation.functions or config.reward.functions}


def device_peak(config: RunConfig, parallel: ParallelContext) -> float | None:
    """What one rank's device could do in TFLOP/s, when it is known."""
    if config.profiling.peak_tflops is not None or parallel.device.type != "cuda":
        return config.profiling.peak_tflops
    return peak_tflops(torch.cuda.get_device_name(parallel.device))


def fresh_state(parallel: ParallelContext) -> TrainState:
    """The state of a run that begins; the same on every rank."""
    return TrainState(wandb_id=gather_objects(uuid.uuid4().hex[:8], parallel)[0])


def build_log(
    config: RunConfig | RewardTrainingConfig,
    folder: RunFolder,
    state: TrainState,
    parallel: ParallelContext,
    *,
    unlogged: bool = False,
) -> tuple[Console, list[Sink]]:
    """Console and metric sinks; silent and empty on every rank but the first.

    Args:
        unlogged: the metrics of the state's step are still to come.
    """
    if not parallel.is_main:
        return SilentConsole(), []
    # a beginning writes step 0 itself, whatever an earlier attempt left
    kept = state.step - unlogged if state.step else -1
    sinks: list[Sink] = [JsonlSink(folder.metrics, kept)]
    if config.metrics.tensorboard:
        sinks.append(TensorboardSink(folder.tensorboard, kept))
    if config.metrics.wandb != "disabled":
        assert state.wandb_id is not None
        plain: dict[str, Any] = flatten(config)
        sinks.append(
            WandbSink(
                folder.path,
                mode=config.metrics.wandb,
                project=config.metrics.wandb_project,
                name=config.run.name,
                run_id=state.wandb_id,
                config=plain,
            )
        )
    console = build_console(
        config.metrics.console, name=config.run.name, num_steps=config.run.num_steps, every=config.metrics.log_every
    )
    return console, sinks


def _stop_token_ids(config: RunConfig, tokenizer: Any) -> tuple[int, ...]:
    return tuple(sorted({tokenizer.eos_token_id, *config.rollout.stop_token_ids}))
