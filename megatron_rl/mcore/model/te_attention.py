"""Transformer Engine's attention on ``PackedSequences``. Importing this module needs Transformer Engine."""

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from torch import Tensor

from megatron_rl.mcore.model.attention import PackedSequences


class PackedTEAttention(TEDotProductAttention):
    """TEDotProductAttention that accepts ``PackedSequences``.

    It supports context parallelism: each rank holds the chunks of a sequence that Transformer Engine expects.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
        **others: Any,
    ) -> Tensor:
        """Return [L, S, heads * head_dim], or [T, heads * head_dim] when packed."""
        packing = None if packed_seq_params is None else packed_seq_params.for_transformer_engine()
        return super().forward(
            query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params=packing, **others
        )
