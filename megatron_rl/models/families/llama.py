"""Llama 2 and 3.x, and DeepSeek-R1-Distill-Llama."""

from megatron_rl.models.families.common import HFConfig, decoder, reject_value
from megatron_rl.models.spec import ModelSpec


def spec(config: HFConfig) -> ModelSpec:
    """Return the specification of a model. Source: transformers' LlamaConfig."""
    reject_value(config, "attention_bias", True)
    reject_value(config, "mlp_bias", True)
    return decoder("llama", config)
