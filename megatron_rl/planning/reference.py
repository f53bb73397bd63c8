"""Where the reference model of a configuration is placed."""

from typing import Literal

from megatron_rl.config.schema import RunConfig

ReferencePlacement = Literal["nowhere", "base", "host", "device"]
"""nowhere: there is no reference; base: it is the policy without its adapters; host: its weights are on the host and
swapped with the policy's to compute log-probabilities; device: it is on the device beside the policy."""


def reference_placement(config: RunConfig, *, is_alike: bool) -> ReferencePlacement:
    """Return where the reference is placed.

    Args:
        is_alike: whether it has the policy's architecture.
    """
    algorithm = config.algorithm
    if not algorithm.uses_reference:
        return "nowhere"
    is_own = algorithm.reference_path in (None, config.model.path)
    if config.lora.rank and is_own and not algorithm.reference_reset_every:
        return "base"
    is_dense = not config.precision.fp8_params and config.lora.quantize == "none"
    return "host" if is_alike and is_dense else "device"
