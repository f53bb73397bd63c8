"""Which part of each Hugging Face tensor a rank of a tensor-parallel inference engine reads.

vLLM and SGLang shard in the same way: q, k, v, gate, up, embedding and head by their outputs, o and down by their
inputs; everything else is replicated. If there are more ranks than key/value heads, several ranks read the same head.
"""

from collections.abc import Mapping

from megatron_rl.errors import ConfigError
from megatron_rl.models.spec import ModelSpec
from megatron_rl.models.table import EMBEDDING, LM_HEAD
from megatron_rl.weights.layout import Box, full_box

# both engines pad the vocabulary to a multiple of this and split the padded vocabulary
VOCABULARY_MULTIPLE = 64


def engine_boxes(
    spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], *, tp_rank: int, tp_size: int
) -> dict[str, Box]:
    """Return the box of every tensor that one rank of the engine reads; a box without rows if it reads nothing.

    Args:
        shapes: shapes of all Hugging Face tensors, by name.

    Raises:
        ConfigError: heads or feed-forward columns do not divide by the ranks.
    """
    check_engine_size(spec, tp_size)
    return {name: _box(spec, name, shape, tp_rank, tp_size) for name, shape in shapes.items()}


def check_engine_size(spec: ModelSpec, tp_size: int) -> None:
    """Check that an engine can split the model over ``tp_size`` ranks.

    Raises:
        ConfigError: it cannot.
    """
    groups = spec.num_query_groups
    features = spec.ffn_hidden_size if spec.moe is None else spec.moe.ffn_hidden_size
    for what, count in (("attention heads", spec.num_heads), ("feed-forward columns", features)):
        if count % tp_size:
            raise ConfigError(
                f"rollout.tensor_parallel_size={tp_size}: the model has {count} {what}. Set it to a divisor of {count}."
            )
    if groups % tp_size and tp_size % groups:
        raise ConfigError(
            f"rollout.tensor_parallel_size={tp_size}: the model has {groups} key/value heads. "
            f"Set it to a divisor or a multiple of {groups}."
        )


def _box(spec: ModelSpec, name: str, shape: tuple[int, ...], rank: int, size: int) -> Box:
    whole = full_box(shape)
    if name in (EMBEDDING, LM_HEAD):
        padded = -(-shape[0] // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        share = -(-padded // size)
        return ((min(rank * share, shape[0]), min((rank + 1) * share, shape[0])), *whole[1:])
    matrix = name.split(".")[-2]
    if matrix in ("k_proj", "v_proj"):
        return (_key_value_rows(spec, rank, size), *whole[1:])
    if matrix in ("q_proj", spec.hf_names.gate, spec.hf_names.up):
        return (_share(shape[0], rank, size), *whole[1:])
    if matrix in ("o_proj", spec.hf_names.down):
        return (whole[0], _share(shape[1], rank, size))
    return whole


def _key_value_rows(spec: ModelSpec, rank: int, size: int) -> tuple[int, int]:
    if size <= spec.num_query_groups:
        return _share(spec.num_query_groups * spec.head_dim, rank, size)
    head = rank // (size // spec.num_query_groups)
    return head * spec.head_dim, (head + 1) * spec.head_dim


def _share(extent: int, rank: int, size: int) -> tuple[int, int]:
    part = extent // size
    return rank * part, (rank + 1) * part
