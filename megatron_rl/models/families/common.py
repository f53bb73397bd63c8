"""Shared by the families: reading the config.json fields that all decoders have."""

import math
from typing import Any

from megatron_rl.errors import ConversionError
from megatron_rl.models.spec import (
    HFNames,
    LinearRope,
    Llama3Rope,
    ModelSpec,
    MoeSpec,
    RopeScaling,
    SlidingWindow,
    YarnRope,
)

HFConfig = dict[str, Any]


def decoder(
    family: str,
    config: HFConfig,
    *,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    moe: MoeSpec | None = None,
    sliding_window: SlidingWindow | None = None,
    hf_names: HFNames = HFNames(),  # noqa: B008  frozen
) -> ModelSpec:
    """Return the specification of a decoder: options that differ between families are passed in, the rest is read.

    Raises:
        KeyError: a field is missing.
        ConversionError: a field has a value that no family supports.
    """
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
        sliding_window=sliding_window,
        hf_names=hf_names,
    )


def window_of_later_layers(config: HFConfig) -> SlidingWindow | None:
    """Return the sliding window of a Qwen model, or None.

    With ``use_sliding_window``, layers from ``max_window_layers`` on have the window.

    Raises:
        ConversionError: ``layer_types`` contradicts the rule.
    """
    size = config.get("sliding_window") if config.get("use_sliding_window") else None
    num_layers = config["num_hidden_layers"]
    first = min(config.get("max_window_layers", 28), num_layers) if size else num_layers
    expected = ["full_attention"] * first + ["sliding_attention"] * (num_layers - first)
    if config.get("layer_types", expected) != expected:
        raise ConversionError(
            f"config.json: layer_types={config['layer_types']}: expected full attention below layer {first} and "
            "sliding attention from there on, according to use_sliding_window and max_window_layers."
        )
    return SlidingWindow(size=size, first_layer=first) if size and first < num_layers else None


def reject_value(config: HFConfig, key: str, value: object) -> None:
    """Raise an error if a key has a value that the family does not support.

    Raises:
        ConversionError: the configuration has this value.
    """
    if config.get(key) == value:
        raise ConversionError(f"config.json: {key}={value} is not supported for {config['architectures'][0]}.")


def _rope(config: HFConfig) -> tuple[float, RopeScaling | None]:
    """Return the base and the scaling; transformers 5 writes rope_parameters, earlier versions two separate keys."""
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
