"""Llama 2 and 3.x, and DeepSeek-R1-Distill-Llama."""

from megatron_rl.models.families.common import HFConfig, decoder, refuse
from megatron_rl.models.spec import ModelSpec


def spec(config: HFConfig) -> ModelSpec:
    """Source: transformers' LlamaConfig."""
    refuse(config, "attention_bias", True)
    refuse(config, "mlp_bias", True)
    return decoder("llama", config)
