"""Map parameters of the layout table to their keys in Megatron's distributed checkpoints."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# Transformer Engine fuses a norm with the matrix that follows it; checkpoints use the fused names
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_FUSED = {plain: fused for fused, plain in FUSED_NORMS.items()}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
# keys that are not model weights: optimizer states, random states and the like
NO_WEIGHTS = re.compile(
    r"(chained_\d+\.)?optimizer\b|rng_state|opt_param_scheduler|rerun_state_machine|.*_extra_state|.*\.inv_freq$"
)


@dataclass(frozen=True)
class StoredKey:
    """A tensor of a checkpoint, or a part of one, that stores a parameter or half of its rows."""

    key: str
    prefix: tuple[int, ...] = ()
    """Indices into the leading dimensions of the tensor, which stack layers and experts."""
    half: int | None = None
    """0 for the first half of the parameter's rows, 1 for the second; None for all rows."""


def stored_forms(parameter: str) -> Iterator[tuple[StoredKey, ...]]:
    """Yield the forms in which a checkpoint may store a parameter, the usual one first.

    Args:
        parameter: name in the layout table.
    """
    matched = _LAYER.fullmatch(parameter)
    if matched is None:
        yield (StoredKey(parameter),)
        return
    layer, inside = int(matched[1]), matched[2]
    expert = _EXPERT.fullmatch(inside)
    if expert is not None:
        number, matrix = int(expert[1]), expert[2]
        yield (StoredKey(f"decoder.layers.mlp.experts.experts.{matrix}", (layer, number)),)
        yield (StoredKey(f"decoder.layers.{layer}.mlp.experts.experts.{matrix}", (number,)),)
        yield from _singles(f"decoder.layers.{layer}.mlp.experts.experts.{number}.{matrix}")
        return
    for name in dict.fromkeys((_FUSED.get(inside, inside), inside)):
        yield (StoredKey(f"decoder.layers.{name}", (layer,)),)
        yield from _singles(f"decoder.layers.{layer}.{name}")


def _singles(key: str) -> Iterator[tuple[StoredKey, ...]]:
    yield (StoredKey(key),)
    yield StoredKey(f"{key}_w", half=0), StoredKey(f"{key}_v", half=1)  # gate and up stored separately


def written_form(parameter: str, *, experts: bool) -> StoredKey:
    """Return the form that Megatron with Transformer Engine writes and reads.

    Args:
        parameter: name in the layout table.
        experts: whether the model has experts; if so, the norm before them is not fused.
    """
    if experts and parameter.endswith(".pre_mlp_layernorm.weight"):
        layer = parameter.split(".")[2]
        return StoredKey("decoder.layers.pre_mlp_layernorm.weight", (int(layer),))
    return next(stored_forms(parameter))[0]
