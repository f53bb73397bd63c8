"""Under which keys Megatron's distributed checkpoints hold a parameter of the layout table."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# Transformer Engine fuses a norm into the matrix that follows it; checkpoints use its names
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_FUSED = {plain: fused for fused, plain in FUSED_NORMS.items()}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
# optimizer states, and what is no weight of the model
NO_WEIGHTS = re.compile(
    r"(chained_\d+\.)?optimizer\b|rng_state|opt_param_scheduler|rerun_state_machine|.*_extra_state|.*\.inv_freq$"
)


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint that holds a parameter, or a part of its rows."""

    key: str
    prefix: tuple[int, ...] = ()
    """Indices into leading dimensions that number layers and experts."""
    half: int | None = None
    """0: the first half of the rows, 1: the second; None: all."""


def stored_forms(parameter: str) -> Iterator[tuple[Stored, ...]]:
    """The forms in which a parameter may be stored, the usual one first.

    Args:
        parameter: name in the layout table.
    """
    matched = _LAYER.fullmatch(parameter)
    if matched is None:
        yield (Stored(parameter),)
        return
    layer, inside = int(matched[1]), matched[2]
    expert = _EXPERT.fullmatch(inside)
    if expert is not None:
        number, matrix = int(expert[1]), expert[2]
        yield (Stored(f"decoder.layers.mlp.experts.experts.{matrix}", (layer, number)),)
        yield (Stored(f"decoder.layers.{layer}.mlp.experts.experts.{matrix}", (number,)),)
        yield from _singles(f"decoder.layers.{layer}.mlp.experts.experts.{number}.{matrix}")
        return
    for name in dict.fromkeys((_FUSED.get(inside, inside), inside)):
        yield (Stored(f"decoder.layers.{name}", (layer,)),)
        yield from _singles(f"decoder.layers.{layer}.{name}")


def _singles(key: str) -> Iterator[tuple[Stored, ...]]:
    yield (Stored(key),)
    yield Stored(f"{key}_w", half=0), Stored(f"{key}_v", half=1)  # the gate apart from what it gates


def written_form(parameter: str, *, experts: bool) -> Stored:
    """The form that Megatron with Transformer Engine writes and reads.

    Args:
        experts: the model has experts; the norm before them is not fused.
    """
    if experts and parameter.endswith(".pre_mlp_layernorm.weight"):
        layer = parameter.split(".")[2]
        return Stored("decoder.layers.pre_mlp_layernorm.weight", (int(layer),))
    return next(stored_forms(parameter))[0]
