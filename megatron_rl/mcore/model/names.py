"""Convert Megatron's parameter names to those of the layout table."""

from typing import Any

from megatron_rl.types import ParallelContext
from megatron_rl.weights.megatron_keys import FUSED_NORMS


def global_name(name: str, chunk: Any, parallel: ParallelContext) -> str:
    """Return a parameter's name in the layout table, with layers and experts numbered over the whole model.

    The name is the same for every implementation of the layer.

    Args:
        name: name in ``chunk.named_parameters()``.
        chunk: model chunk that holds the parameter.
        parallel: layout of this rank.
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
    """Return ``mlp.experts.local_experts.E.linear_fc1.weight``, also for ``linear_fc1.weightE`` of a grouped layer."""
    parts = inside.split(".")
    first = parallel.ep_rank * layer.mlp.num_local_experts
    if parts[2] == "local_experts":
        return ".".join([*parts[:3], str(first + int(parts[3])), *parts[4:]])
    matrix, weight = parts[2], parts[3]
    return f"mlp.experts.local_experts.{first + int(weight.removeprefix('weight'))}.{matrix}.weight"
