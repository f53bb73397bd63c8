"""The families that are supported: one short function from config.json to a ModelSpec each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rl.errors import ConversionError
from megatron_rl.models.spec import ModelSpec, RopeScaling

HFConfig = dict[str, Any]

LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def qwen2(config: HFConfig) -> ModelSpec:
    """Qwen2 and Qwen2.5, the Math models included: bias on queries, keys and values."""
    _refuse(config, "use_sliding_window", True)
    return _decoder("qwen2", config, qkv_bias=True, qk_norm=False)


def qwen3(config: HFConfig) -> ModelSpec:
    """Qwen3 (dense): norm on query and key heads, a head size of its own."""
    _refuse(config, "use_sliding_window", True)
    _refuse(config, "attention_bias", True)
    return _decoder("qwen3", config, qkv_bias=False, qk_norm=True)


def llama(config: HFConfig) -> ModelSpec:
    """Llama 2 and 3.x, and distilled models of that architecture."""
    _refuse(config, "attention_bias", True)
    _refuse(config, "mlp_bias", True)
    return _decoder("llama", config, qkv_bias=False, qk_norm=False)


FAMILIES: dict[str, Callable[[HFConfig], ModelSpec]] = {
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
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


def _decoder(family: str, config: HFConfig, *, qkv_bias: bool, qk_norm: bool) -> ModelSpec:
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
    )


def _rope(config: HFConfig) -> tuple[float, RopeScaling | None]:
    """Base and scaling; transformers 5 writes rope_parameters, earlier versions two separate keys."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    parameters = dict(new or old or {})
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConversionError(f"rope type {kind!r} is not supported, only 'default' and 'llama3'.")
    for key, value in LLAMA3_FIXED.items():
        if float(parameters[key]) != value:
            raise ConversionError(f"rope {key}={parameters[key]} is not supported: Megatron-Core fixes it at {value}.")
    return theta, RopeScaling(
        factor=float(parameters["factor"]),
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_max_position_embeddings=int(parameters["original_max_position_embeddings"]),
    )


def _refuse(config: HFConfig, key: str, value: object) -> None:
    if config.get(key) == value:
        raise ConversionError(f"config.json: {key}={value} is not supported for {config['architectures'][0]}.")
