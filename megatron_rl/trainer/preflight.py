"""Checks that need no weights in memory and run before anything is built."""

from collections.abc import Sequence

import torch

from megatron_rl.algorithms.advantages import ADVANTAGES, TOKEN_ADVANTAGES, distillation_advantages, process_advantages
from megatron_rl.algorithms.objective import build_objective
from megatron_rl.config import RunConfig
from megatron_rl.config.lora import LoraSection
from megatron_rl.config.plugins import load_symbol
from megatron_rl.config.reward import RewardFunctionSection
from megatron_rl.data.prompts import PromptSet
from megatron_rl.data.templates import load_tokenizer
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.mcore.model.config import transformer_config
from megatron_rl.mcore.model.gpt_model import check_weights
from megatron_rl.mcore.model.precision import Implementation, choose_implementation
from megatron_rl.mcore.model.quantized import BLOCK
from megatron_rl.mcore.optimizer import check_optimizer
from megatron_rl.mcore.reward_model import check_scores
from megatron_rl.models import ModelSpec, read_model_spec
from megatron_rl.models.engine_shards import check_engine_size
from megatron_rl.models.lora import ATTENTION_TARGETS, adaptable_matrices, lora_table
from megatron_rl.rewards.registry import build_grader
from megatron_rl.weights.layout import hf_shapes
from megatron_rl.weights.peft_files import PeftReader


def check_models(config: RunConfig) -> ModelSpec:
    """Check the models of a run against its layout, precision and engine; return the policy's spec.

    Raises:
        ConfigError, ConversionError: a model's files are missing or do not fit the configuration.
    """
    spec = read_model_spec(config.model.path)
    implementation = choose_implementation(config)
    check_optimizer(config)
    if config.moe.routing_replay and spec.moe is None:
        raise ConfigError(f"moe.routing_replay=true: {spec.family} has no experts. Set it to false.")
    if config.profiling.memory_snapshot and not torch.cuda.is_available():
        raise ConfigError("profiling.memory_snapshot=true needs a GPU. Set it to false.")
    transformer_config(spec, config, implementation)
    check_engine_size(spec, config.rollout.tensor_parallel_size)
    check_weights(spec, config.model.path)
    if config.algorithm.uses_reference and config.algorithm.reference_path is not None:
        check_reference(config, config.algorithm.reference_path, spec, implementation)
    check_lora(config.lora, spec, config.parallel.tensor_parallel_size)
    if config.algorithm.uses_critic:
        check_value_model(config.for_critic(), config.model.path, implementation, "critic.path")
    if config.reward.model is not None:
        reward_config = config.for_reward_model(config.reward.model.path)
        check_value_model(reward_config, config.model.path, implementation, "reward.model.path")
        check_scores(reward_config.model.path)
    return spec


def check_plugins(config: RunConfig) -> None:
    """Check that every named reward, loss and advantage function exists and takes its options.

    Raises:
        ConfigError: a function does not exist or does not take its options.
    """
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


def reward_functions(config: RunConfig) -> dict[str, Sequence[RewardFunctionSection]]:
    """Reward functions under the keys ``train`` and ``validation``."""
    return {"train": config.reward.functions, "validation": config.validation.functions or config.reward.functions}


def check_reference(config: RunConfig, path: str, spec: ModelSpec, implementation: Implementation) -> None:
    """Check a reference model that has its own weights.

    Args:
        path: folder of the reference model.
        spec: spec of the policy.

    Raises:
        ConfigError, ConversionError: the model cannot be the reference of this policy.
    """
    reference = read_model_spec(path)
    transformer_config(reference, config, implementation)
    check_weights(reference, path)
    if config.algorithm.reference_reset_every and reference != spec:
        raise ConfigError(
            f"algorithm.reference_reset_every={config.algorithm.reference_reset_every}, but the model of "
            f"algorithm.reference_path={path} does not have the policy's architecture and cannot load its weights. "
            "Set algorithm.reference_reset_every=0, or use a reference of the same architecture."
        )
    if reference.vocab_size != spec.vocab_size:
        raise ConfigError(
            f"algorithm.reference_path={path} has a vocabulary of {reference.vocab_size} tokens, the policy of "
            f"{spec.vocab_size}. "
            "The reference must share the policy's tokenizer."
        )


def check_lora(config: LoraSection, spec: ModelSpec, tp_size: int) -> None:
    """Check that the LoRA adapters fit the model.

    Raises:
        ConfigError, ConversionError: the adapters do not fit the model.
    """
    if not config.rank:
        return
    if config.quantize != "none" and spec.moe is not None:
        raise ConfigError(
            f"lora.quantize={config.quantize}: the experts of {spec.family}, nearly all of its weights, would not be "
            "quantised. Set lora.quantize=none."
        )
    for name, matrix in adaptable_matrices(spec).items():
        columns = matrix.columns // (1 if matrix.splits_rows else tp_size)
        if config.quantize != "none" and columns % BLOCK:
            raise ConfigError(
                f"lora.quantize={config.quantize}: {name} has {columns} columns on each rank, not a multiple of the "
                f"{BLOCK} that share a scale. Lower parallel.tensor_parallel_size, or set lora.quantize=none."
            )
    unknown = [target for target in config.targets if target not in adaptable_matrices(spec)]
    if unknown:
        raise ConfigError(
            f"lora.targets={config.targets}: adapters on the experts of {spec.family} are not supported. "
            f"Set lora.targets=[{','.join(ATTENTION_TARGETS)}]."
        )
    if config.path is not None:
        shapes = hf_shapes(lora_table(spec, config.rank, config.targets))
        PeftReader(config.path, shapes, rank=config.rank, alpha=config.alpha)


def check_value_model(config: RunConfig, policy: str, implementation: Implementation, key: str) -> None:
    """Check a model with a value head: a critic or a reward model.

    Args:
        config: configuration with this model in the policy's place.
        policy: folder of the policy.
        key: configuration key of this model's folder, for messages.

    Raises:
        ConfigError, ConversionError: the model cannot be used with this policy.
    """
    spec, policy_spec, path = read_model_spec(config.model.path), read_model_spec(policy), config.model.path
    transformer_config(spec, config, implementation)
    check_optimizer(config)
    check_weights(spec, path, "value")
    vocabulary = load_tokenizer(policy).get_vocab()
    if max(vocabulary.values()) >= spec.vocab_size or load_tokenizer(path).get_vocab() != vocabulary:
        raise ConfigError(
            f"{key}={path} has {spec.vocab_size} tokens that differ from the policy's {policy_spec.vocab_size}. "
            "It must share the policy's tokenizer."
        )
    if spec.max_position_embeddings < policy_spec.max_position_embeddings:
        raise ConfigError(
            f"{key}={path} has {spec.max_position_embeddings} positions, fewer than the policy's "
            f"{policy_spec.max_position_embeddings}. Choose a model with at least as many positions as the policy."
        )


def check_prompts(prompts: PromptSet, spec: ModelSpec, config: RunConfig) -> None:
    """Check that prompts and responses fit the model's positions and vocabulary.

    Raises:
        ConfigError: prompt and response are longer than the model's positions.
        DataError: a token id is outside of the model's vocabulary.
    """
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
            f"the tokenizer produces token id {largest}, but the model has {spec.vocab_size} tokens. "
            "Use the tokenizer of this model."
        )
