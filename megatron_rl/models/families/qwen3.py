"""Qwen3 (dense): norm on query and key heads, a head size of its own."""

from megatron_rl.models.families.common import HFConfig, decoder, refuse, window_of_later_layers
from megatron_rl.models.spec import ModelSpec


def spec(config: HFConfig) -> ModelSpec:
    """Source: transformers' Qwen3Config."""
    refuse(config, "attention_bias", True)
    # transformers reads 128 where the file says nothing
    return decoder("qwen3", {"head_dim": 128} | config, qk_norm=True, sliding_window=window_of_later_layers(config))
