"""Core attention on torch's scaled_dot_product_attention, and the norm that goes with it.

Megatron's own local attention refuses packed sequences and materialises the scores; this one does
neither. It needs no Transformer Engine and runs on CPU and GPU.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

# Sequences are padded to a common length when at most this share of the rows is padding.
MAX_PADDING = 0.25


@dataclass(frozen=True)
class LengthGroup:
    """Packed sequences of similar length that one attention call handles."""

    rows: Tensor
    """[n, longest] int64: place of each position among the T packed ones (any place beyond the end)."""
    kept: Tensor
    """[n * longest] int64: which of those are real."""
    places: Tensor
    """[sum of lengths] int64: where the real ones belong among the T packed ones."""


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed batch with its length groups, found once for all layers."""

    length_groups: tuple[LengthGroup, ...] = field(default=())


def packed_sequences(cu_seqlens: tuple[int, ...], device: torch.device) -> PackedSequences:
    """Describe a packed batch.

    Args:
        cu_seqlens: [S + 1] starts of the sequences and the end.
    """
    ends = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    longest = max(b - a for a, b in pairwise(cu_seqlens))
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        length_groups=group_by_length(cu_seqlens, device),
    )


def group_by_length(cu_seqlens: tuple[int, ...], device: torch.device) -> tuple[LengthGroup, ...]:
    """Cut the sequences, sorted by length, into groups that waste little on padding."""
    spans = sorted(pairwise(cu_seqlens), key=lambda span: span[0] - span[1])
    groups: list[list[tuple[int, int]]] = []
    real = 0
    for start, stop in spans:
        longest = groups[-1][0][1] - groups[-1][0][0] if groups else 0
        rows = longest * (len(groups[-1]) + 1) if groups else 0
        if not groups or rows - (real + stop - start) > MAX_PADDING * rows:
            groups.append([])
            real = 0
        groups[-1].append((start, stop))
        real += stop - start
    return tuple(_length_group(sorted(group), cu_seqlens[-1], device) for group in groups)


def _length_group(spans: list[tuple[int, int]], total: int, device: torch.device) -> LengthGroup:
    starts = torch.tensor([start for start, _ in spans], device=device)
    lengths = torch.tensor([stop - start for start, stop in spans], device=device)
    offsets = torch.arange(int(lengths.max()), device=device)
    rows = starts[:, None] + offsets  # [n, longest]
    real = (offsets < lengths[:, None]).flatten()
    return LengthGroup(rows=rows.clamp(max=total - 1), kept=real.nonzero().flatten(), places=rows.flatten()[real])


class SdpaCoreAttention(MegatronModule):
    """Causal attention over [L, S, heads, head_dim] or packed [T, heads, head_dim] queries.

    Padding needs no mask: it stands on the right, where causal attention never looks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """[L, S, heads * head_dim], or [T, heads * head_dim] when packed."""
        if packed_seq_params is None:
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)
        parts, places = [], []
        for group in packed_seq_params.length_groups:
            q, k, v = (x[group.rows].transpose(1, 2) for x in (query, key, value))  # [n, heads, longest, dim]
            parts.append(self._attend(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)[group.kept])
            places.append(group.places)
        out = torch.cat(parts)  # real rows, in the order of ``places``
        return torch.empty_like(out).index_copy(0, torch.cat(places), out)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """No weights."""
        return {}


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMS norm, marked so that Megatron sums its gradient under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
