"""All checks that need no model, before anything is built."""

from collections.abc import Sequence

import torch

from megatron_rl.algorithms.advantages import ADVANTAGES, TOKEN_ADVANTAGES, distillation_advantages, process_advantages
from megatron_rl.algorithms.objective import build_objective
from megatron_rl.config import RunConfig, validate
from megatron_rl.config.lora import LoraSection
from megatron_rl.config.plugins import load_symbol
from megatron_rl.config.reward import RewardFunctionSection
from megatron_rl.config.rollout import RolloutSection
from megatron_rl.data.curriculum import Curriculum
from megatron_rl.data.prompts import PromptSet, load_prompts
from megatron_rl.data.templates import load_tokenizer
from megatron_rl.distributed.collectives import raise_together
from megatron_rl.environments import build_environment
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.evaluation.in_training import read_benchmark_suite
from megatron_rl.mcore.model.config import transformer_config
from megatron_rl.mcore.model.gpt_model import check_weights
from megatron_rl.mcore.model.precision import Implementation, choose_implementation
from megatron_rl.mcore.model.quantized import BLOCK
from megatron_rl.mcore.optimizer import check_optimizer
from megatron_rl.mcore.reward_model import check_scores
from megatron_rl.models import ModelSpec, read_model_spec
from megatron_rl.models.engine_shards import check_engine_size
from megatron_rl.models.lora import ATTENTION_TARGETS, adapted_matrices, lora_table
from megatron_rl.rewards.registry import build_grader
from megatron_rl.rollout.multi_turn import MultiTurn
from megatron_rl.types import ParallelContext
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
        self.dialogue = build_multi_turn(config.rollout)
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
            _check_value_model(config.for_critic(), config.model.path, implementation, "critic.path")
        if config.reward.model is not None:
            own = config.for_reward_model(config.reward.model.path)
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
        self.validation: PromptSet | None = None
        if config.data.validation is not None:
            self.validation = load_prompts(config.data.validation, config.data, self.tokenizer)
        for prompts in (self.train, self.validation):
            if prompts is not None:
                _check_fits(prompts, spec, config)
        self.suite = read_benchmark_suite(config, self.tokenizer)
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
    new = max(config.rollout.max_new_tokens, config.validation.max_new_tokens or 0)
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


def build_multi_turn(config: RolloutSection) -> MultiTurn | None:
    """With whom the policy speaks; None without an environment."""
    if config.environment is None:
        return None
    environment = build_environment(config.environment, config.environment_options)
    return MultiTurn(environment=environment, max_turns=config.max_turns, template=config.turn_template)


def build_curriculum(config: RunConfig, prompts: PromptSet) -> Curriculum:
    """Which prompts there are at which step."""
    return Curriculum(prompts.prompts, config.data, max_new_tokens=config.rollout.max_new_tokens, seed=config.run.seed)


def reward_functions(config: RunConfig) -> dict[str, Sequence[RewardFunctionSection]]:
    """The named sets of reward functions."""
    return {"train": config.reward.functions, "validation": config.validation.functions or config.reward.functions}
