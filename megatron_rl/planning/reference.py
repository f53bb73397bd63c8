"""Where the reference model of a configuration lives."""

from typing import Literal

from megatron_rl.config.schema import RunConfig

Where = Literal["nowhere", "base", "host", "device"]
"""nowhere: there is none; base: the policy without its adapters; host: it takes the policy's place while it scores;
device: beside the policy."""


def place_of_reference(config: RunConfig, *, is_alike: bool) -> Where:
    """
    Args:
        is_alike: it has the policy's architecture.
    """
    algorithm = config.algorithm
    if not algorithm.uses_reference:
        return "nowhere"
    is_own = algorithm.reference_path in (None, config.model.path)
    if config.lora.rank and is_own and not algorithm.reference_reset_every:
        return "base"
    is_dense = not config.precision.fp8_params and config.lora.quantize == "none"
    return "host" if is_alike and is_dense else "device"
