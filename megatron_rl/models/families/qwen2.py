"""Qwen2 and Qwen2.5, their Math models, and DeepSeek-R1-Distill-Qwen: bias on query, key and value projections."""

from megatron_rl.models.families.common import HFConfig, decoder, window_of_later_layers
from megatron_rl.models.spec import ModelSpec


def spec(config: HFConfig) -> ModelSpec:
    """Return the specification of a model. Source: transformers' Qwen2Config."""
    return decoder("qwen2", config, qkv_bias=True, sliding_window=window_of_later_layers(config))
