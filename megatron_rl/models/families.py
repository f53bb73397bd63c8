"""The families that are supported: one short function from config.json to a ModelSpec each."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rl.errors import ConversionError
from megatron_rl.models.spec import LinearRope, Llama3Rope, ModelSpec, MoeSpec, RopeScaling, YarnRope

HFConfig = dict[str, Any]


def qwen2(config: HFConfig) -> ModelSpec:
    """Qwen2 and Qwen2.5, the Math models included: bias on queries, keys and values."""
    _refuse(config, "use_sliding_window", True)
    return _decoder("qwen2", config, qkv_bias=True, qk_norm=False)


def qwen3(config: HFConfig) -> ModelSpec:
    """Qwen3 (dense): norm on query and key heads, a head size of its own."""
    _refuse(config, "use_sliding_window", True)
    _refuse(config, "attention_bias", True)
    return _decoder("qwen3", config, qkv_bias=False, qk_norm=True)


def qwen3_moe(config: HFConfig) -> ModelSpec:
    """Qwen3 with a mixture of experts in every layer."""
    _refuse(config, "use_sliding_window", True)
    _refuse(config, "attention_bias", True)
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise ConversionError(
            f"config.json: mlp_only_layers={config.get('mlp_only_layers')}, "
            f"decoder_sparse_step={config.get('decoder_sparse_step')}: only models with experts in every layer "
            "are supported."
        )
    moe = MoeSpec(
        num_experts=config["num_experts"] if "num_experts" in config else config["num_local_experts"],
        experts_per_token=config["num_experts_per_tok"],
        ffn_hidden_size=config["moe_intermediate_size"],
        normalize_probabilities=bool(config.get("norm_topk_prob", False)),
    )
    return _decoder("qwen3_moe", config, qkv_bias=False, qk_norm=True, moe=moe)


def llama(config: HFConfig) -> ModelSpec:
    """Llama 2 and 3.x, and distilled models of that architecture."""
    _refuse(config, "attention_bias", True)
    _refuse(config, "mlp_bias", True)
    return _decoder("llama", config, qkv_bias=False, qk_norm=False)


FAMILIES: dict[str, Callable[[HFConfig], ModelSpec]] = {
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "LlamaForCausalLM": llama,
}


def read_model_spec(folder: str | Path) -> ModelSpec:
    """The model of a Hugging Face folder.

    Raises:
        ConversionError: config.json is missing, damaged, incomplete or of an unsupported architecture.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ConversionError(
            f"{path}: {error.strerror or error}. model.path must be a Hugging Face checkpoint folder."
        ) from error
    except json.JSONDecodeError as error:
        raise ConversionError(f"{path} is not JSON: {error}. Fetch it again.") from error
    architectures = config.get("architectures") or ["none"]
    family = FAMILIES.get(architectures[0])
    if family is None:
        raise ConversionError(
            f"{path}: architecture {architectures[0]} is not supported. Supported: {', '.join(FAMILIES)}."
        )
    try:
        return family(config)
    except KeyError as error:
        raise ConversionError(
            f"{path}: key {error} is missing. The file does not describe a {architectures[0]}."
        ) from error


def _decoder(family: str, config: HFConfig, *, qkv_bias: bool, qk_norm: bool, moe: MoeSpec | None = None) -> ModelSpec:
    if config.get("hidden_act", "silu") != "silu":
        raise ConversionError(f"{family}: hidden_act={config['hidden_act']!r} is not supported, only 'silu'.")
    heads = config["num_attention_heads"]
    theta, scaling = _rope(config)
    return ModelSpec(
        family=family,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        norm_epsilon=config["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        moe=moe,
    )


def _rope(config: HFConfig) -> tuple[float, RopeScaling | None]:
    """Base and scaling; transformers 5 writes rope_parameters, earlier versions two separate keys."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    parameters = dict(new or old or {})
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    match kind:
        case "default":
            return theta, None
        case "llama3":
            return theta, Llama3Rope(
                factor=float(parameters["factor"]),
                low_freq_factor=float(parameters["low_freq_factor"]),
                high_freq_factor=float(parameters["high_freq_factor"]),
                original_max_position_embeddings=int(parameters["original_max_position_embeddings"]),
            )
        case "linear":
            return theta, LinearRope(factor=float(parameters["factor"]))
        case "yarn":
            return theta, _yarn(parameters, config)
    raise ConversionError(f"rope type {kind!r} is not supported, only 'default', 'linear', 'llama3' and 'yarn'.")


def _yarn(parameters: HFConfig, config: HFConfig) -> YarnRope:
    original = parameters.get("original_max_position_embeddings") or config["max_position_embeddings"]
    factor = float(parameters.get("factor") or config["max_position_embeddings"] / original)

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        weight, weight_of_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention_factor = magnitude(weight) / magnitude(weight_of_all) if weight and weight_of_all else magnitude(1.0)
    return YarnRope(
        factor=factor,
        original_max_position_embeddings=int(original),
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        truncate=bool(parameters.get("truncate", True)),
        attention_factor=float(attention_factor),
    )


def _refuse(config: HFConfig, key: str, value: object) -> None:
    if config.get(key) == value:
        raise ConversionError(f"config.json: {key}={value} is not supported for {config['architectures'][0]}.")
