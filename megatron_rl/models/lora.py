"""The layout table of low-rank adapters: Megatron parameter name -> slices of PEFT's tensors."""

from collections.abc import Sequence
from typing import NamedTuple

from megatron_rl.models.spec import ModelSpec
from megatron_rl.weights.layout import Layout, column, replicated, row

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Hugging Face names of the attention matrices."""


class AdaptableMatrix(NamedTuple):
    """A matrix of a layer that can have an adapter."""

    module: str
    """Name of Megatron's linear module inside the transformer layer; a fused module holds several matrices."""
    rows: int
    """Output features over all ranks."""
    columns: int
    """Input features over all ranks."""
    splits_rows: bool
    """Whether the tensor-parallel ranks split its rows; otherwise they split its columns."""


def adaptable_matrices(spec: ModelSpec) -> dict[str, AdaptableMatrix]:
    """Return every matrix of a layer that can have an adapter, in the order of Megatron's fused modules."""
    hidden, queries, keys = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_query_groups * spec.head_dim
    attention, qkv = "self_attention.linear_proj", "self_attention.linear_qkv"
    matrices: dict[str, AdaptableMatrix] = {
        "q_proj": AdaptableMatrix(qkv, queries, hidden, True),
        "k_proj": AdaptableMatrix(qkv, keys, hidden, True),
        "v_proj": AdaptableMatrix(qkv, keys, hidden, True),
        "o_proj": AdaptableMatrix(attention, hidden, queries, False),
    }
    if spec.moe is None:
        matrices |= {
            "gate_proj": AdaptableMatrix("mlp.linear_fc1", spec.ffn_hidden_size, hidden, True),
            "up_proj": AdaptableMatrix("mlp.linear_fc1", spec.ffn_hidden_size, hidden, True),
            "down_proj": AdaptableMatrix("mlp.linear_fc2", hidden, spec.ffn_hidden_size, False),
        }
    return matrices


def lora_table(spec: ModelSpec, rank: int, targets: Sequence[str]) -> dict[str, Layout]:
    """Return the layouts of every adapter's matrices a and b, whose scaled product ``b @ a`` is added to the weight.

    Args:
        rank: rank of the adapters.
        targets: Hugging Face names of the matrices that have adapters.
    """
    table: dict[str, Layout] = {}
    for layer in range(spec.num_layers):
        for target, (module, rows, columns, splits_rows) in adaptable_matrices(spec).items():
            if target not in targets:
                continue
            a, b = (f"decoder.layers.{layer}.{module}_lora.{x}_{target}" for x in "ab")
            block = "self_attn" if target in ATTENTION_TARGETS else spec.hf_names.feed_forward
            hf = f"model.layers.{layer}.{block}.{target}"
            name_a, name_b = f"{hf}.lora_A.weight", f"{hf}.lora_B.weight"
            table[a] = replicated(name_a, rank, columns) if splits_rows else row(name_a, rank, columns)
            table[b] = column(name_b, rows, rank) if splits_rows else replicated(name_b, rows, rank)
    return table
