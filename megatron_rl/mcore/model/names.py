"""Megatron's parameter names as the layout table writes them."""

from typing import Any

from megatron_rl.types import ParallelContext
from megatron_rl.weights.megatron_keys import FUSED_NORMS


def global_name(name: str, chunk: Any, parallel: ParallelContext) -> str:
    """A parameter's name with layers and experts numbered over the whole model, whatever module holds it.

    Args:
        name: as ``chunk.named_parameters()`` gives it.
    """
    parts = name.split(".")
    if parts[:2] != ["decoder", "layers"]:
        return name
    layer = chunk.decoder.layers[int(parts[2])]
    inside = ".".join(parts[3:])
    inside = FUSED_NORMS.get(inside, inside)
    if inside.startswith("mlp.experts."):
        inside = _expert_name(inside, layer, parallel)
    return f"decoder.layers.{layer.layer_number - 1}.{inside}"


def _expert_name(inside: str, layer: Any, parallel: ParallelContext) -> str:
    """``mlp.experts.local_experts.E.linear_fc1.weight``, also of a grouped layer's ``linear_fc1.weightE``."""
    parts = inside.split(".")
    first = parallel.ep_rank * layer.mlp.num_local_experts
    if parts[2] == "local_experts":
        return ".".join([*parts[:3], str(first + int(parts[3])), *parts[4:]])
    matrix, weight = parts[2], parts[3]
    return f"mlp.experts.local_experts.{first + int(weight.removeprefix('weight'))}.{matrix}.weight"
