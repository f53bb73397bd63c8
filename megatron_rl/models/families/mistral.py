"""Mistral: Llama's architecture, with a sliding window in the first releases."""

from megatron_rl.models.families.common import HFConfig, decoder
from megatron_rl.models.spec import ModelSpec, SlidingWindow


def spec(config: HFConfig) -> ModelSpec:
    """Return the specification of a model.

    Source: transformers' MistralConfig, whose window is 4096 if the file does not set one.
    """
    size = config.get("sliding_window", 4096)
    return decoder("mistral", config, sliding_window=SlidingWindow(size=size) if size else None)
