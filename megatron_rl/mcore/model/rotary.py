"""Rotary angles from the positions of a micro-batch.

Megatron's own module supports two RoPE scalings and recomputes the positions of packed sequences from their lengths,
sequence by sequence in each layer. Here the frequencies come from the ModelSpec and the positions from the batch, which
covers packing, context parallelism and every scaling.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_rl.batching.context_parallel import context_indices
from megatron_rl.mcore.model.attention import PackedSequences
from megatron_rl.models.rope import inverse_frequencies
from megatron_rl.models.spec import ModelSpec


class PositionRotary(torch.nn.Module):
    """Replacement for GPTModel.rotary_pos_emb.

    Megatron first calls ``get_rotary_seq_len`` and then passes its result to ``forward``; here the result is the
    positions instead of a length.
    """

    def __init__(self, spec: ModelSpec, *, tp_size: int, cp_rank: int, cp_size: int, device: torch.device) -> None:
        super().__init__()
        # [head_dim], each frequency twice, since rotation pairs the two halves
        self._frequencies = inverse_frequencies(spec).repeat(2).to(device)
        self._tp_size = tp_size
        self._cp_rank = cp_rank
        self._cp_size = cp_size

    def get_rotary_seq_len(
        self, inference_context: Any, decoder: Any, decoder_input: Tensor | None, config: Any, packing: Any
    ) -> Tensor:
        """Return the [T] or [L] positions of this context-parallel rank, which Megatron passes to ``forward``."""
        if isinstance(packing, PackedSequences):
            return packing.positions
        hidden = decoder.input_tensor if decoder.input_tensor is not None else decoder_input
        assert hidden is not None
        length = hidden.size(0) * (self._tp_size if config.sequence_parallel else 1) * self._cp_size
        if self._cp_size == 1:
            return torch.arange(length, device=self._frequencies.device)
        return context_indices((0, length), self._cp_rank, self._cp_size).to(self._frequencies.device)

    def forward(self, positions: Tensor, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        """Return float32 angles: [T, 1, head_dim] of a packed batch, [L, 1, 1, head_dim] of a padded one."""
        angles = torch.outer(positions.float(), self._frequencies)
        return angles[:, None] if packed_seq else angles[:, None, None]
