"""Attention and RMS norm for layers without Transformer Engine.

Megatron's own local attention rejects packed sequences, materialises the attention scores and does not support context
parallelism. This attention uses a variable-length kernel on GPUs that have one; otherwise it batches packed sequences
of similar length for torch's scaled_dot_product_attention. With context parallelism it gathers keys and values over
the context-parallel ranks. It runs on CPU and GPU.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_rl.batching.context_parallel import restore_order
from megatron_rl.mcore.model.varlen import variable_length_kernel

# Sequences share an attention call, padded to a common length, when at most this share of the rows is padding.
MAX_PADDING = 0.25


@dataclass(frozen=True)
class LengthGroup:
    """Packed sequences of similar length that one attention call handles."""

    padded_rows: Tensor
    """[n, longest] int64: packed row (of T) at each padded position; arbitrary beyond the end of a sequence."""
    real: Tensor
    """[sum of lengths] int64: indices of the positions without padding, in the flattened [n * longest] positions."""
    packed_rows: Tensor
    """[sum of lengths] int64: packed row (of T) of each position in ``real``."""


@dataclass(frozen=True)
class ContextChunk:
    """Consecutive queries of one sequence that a context-parallel rank holds, and the keys that they attend to."""

    queries: slice
    """Range in this rank's positions."""
    keys: slice
    """Range in all positions in natural order: from the start of the sequence to the last query."""


@dataclass
class PackedSequences(PackedSeqParams):
    """Description of a packed batch, computed once for all layers.

    Of the fields that Megatron itself reads only the format is set. Megatron then applies the given rotary angles
    unchanged; they are those of ``positions``.
    """

    cu_seqlens: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))
    """[S + 1] int32 starts of the sequences, and the end."""
    longest: int = 0
    """Tokens of the longest sequence."""
    positions: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """[T / cp] int64: index of each token in its sequence."""
    length_groups: tuple[LengthGroup, ...] = ()
    """Empty with context parallelism or a variable-length kernel."""
    context_chunks: tuple[ContextChunk, ...] = ()
    """Chunks of this rank; empty without context parallelism."""
    natural_order: Tensor | None = None
    """[T] int64: index of each position in the concatenation of all context-parallel ranks' shares."""

    def for_transformer_engine(self) -> PackedSeqParams:
        """The same batch in the fields that Transformer Engine's attention reads."""
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=self.cu_seqlens,
            cu_seqlens_kv=self.cu_seqlens,
            cu_seqlens_q_padded=self.cu_seqlens,
            cu_seqlens_kv_padded=self.cu_seqlens,
            max_seqlen_q=self.longest,
            max_seqlen_kv=self.longest,
        )


def packed_sequences(
    cu_seqlens: tuple[int, ...], position_ids: Tensor, *, cp_rank: int, cp_size: int, dtype: torch.dtype
) -> PackedSequences:
    """Describe a packed batch for this context-parallel rank.

    Args:
        cu_seqlens: [S + 1] starts of the sequences and the end, before context parallelism.
        position_ids: [1, T / cp] positions of this rank's tokens.
        cp_rank: context-parallel rank.
        cp_size: number of context-parallel ranks.
        dtype: dtype of the queries; it decides which kernel is available.
    """
    device = position_ids.device
    ends = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    longest = max(b - a for a, b in pairwise(cu_seqlens))
    positions = position_ids[0]
    if cp_size > 1:
        return PackedSequences(
            qkv_format="thd",
            cu_seqlens=ends,
            longest=longest,
            positions=positions,
            context_chunks=context_chunks(cu_seqlens, cp_rank, cp_size),
            natural_order=restore_order(cu_seqlens, cp_size).to(device),
        )
    kernel = variable_length_kernel(device, dtype)
    groups = group_by_length(cu_seqlens, device) if kernel is None else ()
    return PackedSequences(
        qkv_format="thd", cu_seqlens=ends, longest=longest, positions=positions, length_groups=groups
    )


def context_chunks(cu_seqlens: tuple[int, ...], rank: int, size: int) -> tuple[ContextChunk, ...]:
    """Return the two chunks of every sequence that a context-parallel rank holds."""
    chunks = []
    offset = 0
    for start, stop in pairwise(cu_seqlens):
        length = (stop - start) // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            chunks.append(ContextChunk(slice(offset, offset + length), slice(start, start + (number + 1) * length)))
            offset += length
    return tuple(chunks)


def group_by_length(cu_seqlens: tuple[int, ...], device: torch.device) -> tuple[LengthGroup, ...]:
    """Split the sequences, sorted by length, into groups with at most ``MAX_PADDING`` of padding."""
    spans = sorted(pairwise(cu_seqlens), key=lambda span: span[0] - span[1])
    groups: list[list[tuple[int, int]]] = []
    num_real = 0
    for start, stop in spans:
        longest = groups[-1][0][1] - groups[-1][0][0] if groups else 0
        rows = longest * (len(groups[-1]) + 1) if groups else 0
        if not groups or rows - (num_real + stop - start) > MAX_PADDING * rows:
            groups.append([])
            num_real = 0
        groups[-1].append((start, stop))
        num_real += stop - start
    return tuple(_length_group(sorted(group), cu_seqlens[-1], device) for group in groups)


def _length_group(spans: list[tuple[int, int]], total: int, device: torch.device) -> LengthGroup:
    starts = torch.tensor([start for start, _ in spans], device=device)
    lengths = torch.tensor([stop - start for start, stop in spans], device=device)
    offsets = torch.arange(int(lengths.max()), device=device)
    rows = starts[:, None] + offsets  # [n, longest]
    is_real = (offsets < lengths[:, None]).flatten()
    return LengthGroup(
        padded_rows=rows.clamp(max=total - 1), real=is_real.nonzero().flatten(), packed_rows=rows.flatten()[is_real]
    )


class CoreAttention(MegatronModule):
    """Causal attention over [L, S, heads, head_dim] or packed [T, heads, head_dim] queries.

    Padding needs no mask: it is on the right, and causal attention only attends to the left.
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
        self.softmax_scale = softmax_scale if softmax_scale is not None else config.softmax_scale
        self._cp = pg_collection.cp
        has_window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self._window = config.window_size[0] + 1 if has_window else None

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
        """Return [L, S, heads * head_dim], or [T, heads * head_dim] when packed."""
        if self._cp.size() > 1:
            return self._across_context(query, key, value, packed_seq_params)
        if packed_seq_params is None:
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)
        kernel = variable_length_kernel(query.device, query.dtype)
        if kernel is not None:
            packing = packed_seq_params
            out = kernel(query, key, value, packing.cu_seqlens, packing.longest, self.softmax_scale, self._window)
            return out.flatten(1)
        return self._by_length_groups(query, key, value, packed_seq_params.length_groups)

    def _by_length_groups(self, query: Tensor, key: Tensor, value: Tensor, groups: tuple[LengthGroup, ...]) -> Tensor:
        outputs, packed_rows = [], []
        for group in groups:
            q, k, v = (x[group.padded_rows].transpose(1, 2) for x in (query, key, value))  # [n, heads, longest, dim]
            outputs.append(self._attend(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)[group.real])
            packed_rows.append(group.packed_rows)
        out = torch.cat(outputs)  # [T, heads * dim], in the order of ``packed_rows``
        return torch.empty_like(out).index_copy(0, torch.cat(packed_rows), out)

    def _across_context(self, query: Tensor, key: Tensor, value: Tensor, packing: PackedSequences | None) -> Tensor:
        """Attend from this rank's queries to all keys; [T, heads, dim] when packed, [L, S, heads, dim] otherwise."""
        size, rank = self._cp.size(), self._cp.rank()
        if packing is None:
            whole = (0, query.size(0) * size)
            chunks, order = context_chunks(whole, rank, size), restore_order(whole, size).to(query.device)
        else:
            assert packing.natural_order is not None
            chunks, order = packing.context_chunks, packing.natural_order
        # the gradient of the gather is a reduce-scatter, so a key's gradient sums over the queries of all ranks
        key, value = (gather_from_sequence_parallel_region(x.contiguous(), group=self._cp)[order] for x in (key, value))
        outputs = []
        for chunk in chunks:
            q, k, v = (
                x[span].unsqueeze(1) if packing is not None else x[span]
                for x, span in ((query, chunk.queries), (key, chunk.keys), (value, chunk.keys))
            )  # [length, S, heads, dim]
            q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
            out = self._attend(q, k, v)
            outputs.append(out.permute(2, 0, 1, 3).flatten(2))
        joined = torch.cat(outputs)  # [length, S, heads * dim]
        return joined.squeeze(1) if packing is not None else joined

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from [S, heads, L, dim] queries, the last L positions of [S, groups, K, dim] keys."""
        mask = self._mask(query.size(2), key.size(2), query.device)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True
        )

    def _mask(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
        """[L, K] bool, True where a query attends to a key; None for plain causal attention with L = K."""
        windowed = self._window is not None and num_keys > self._window
        if num_queries == num_keys and not windowed:
            return None
        before = num_keys - num_queries
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(before)
        return visible.triu(before + 1 - self._window) if windowed and self._window is not None else visible

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Return an empty state: this module has no weights."""
        return {}


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMS norm, marked so that Megatron reduces its gradient under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
