"""Qwen3 (dense): RMS norm on query and key heads; the head size is independent of the hidden size."""

from megatron_rl.models.families.common import HFConfig, decoder, reject_value, window_of_later_layers
from megatron_rl.models.spec import ModelSpec


def spec(config: HFConfig) -> ModelSpec:
    """Return the specification of a model. Source: transformers' Qwen3Config."""
    reject_value(config, "attention_bias", True)
    # 128 is transformers' default if the file has no head_dim
    return decoder("qwen3", {"head_dim": 128} | config, qk_norm=True, sliding_window=window_of_later_layers(config))
