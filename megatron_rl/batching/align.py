"""Sequences to the tensors of one forward pass. The only place that shifts.

Outside this file index t describes token t. A model predicts token t + 1 at position t, so every
per-token array moves one place to the left here, and log-probabilities move back in ``unalign``.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.types import MicroBatch, TrainSequence


def align(sequences: Sequence[TrainSequence], *, packed: bool, multiple_of: int = 1) -> MicroBatch:
    """The micro-batch of some sequences.

    Args:
        sequences: each with at least one token.
        packed: [1, T] one behind the other; otherwise [S, L] padded on the right.
        multiple_of: T (or L) is padded to a multiple of this, as sequence parallelism needs.
    """
    lengths = tuple(sequence.token_ids.numel() for sequence in sequences)
    width = sum(lengths) if packed else max(lengths)
    padding = -width % multiple_of

    def lay_out(rows: list[Tensor]) -> Tensor:
        if packed:
            return F.pad(torch.cat(rows), (0, padding))[None]
        return torch.stack([F.pad(row, (0, width + padding - row.numel())) for row in rows])

    def shifted(read: Callable[[TrainSequence], Tensor]) -> Tensor:
        return lay_out([F.pad(read(sequence)[1:], (0, 1)) for sequence in sequences])

    positions = [torch.arange(length) for length in lengths]
    cu_seqlens = None
    if packed:
        ends = torch.tensor((0, *lengths, *([padding] if padding else []))).cumsum(0)
        cu_seqlens = tuple(ends.tolist())
    return MicroBatch(
        tokens=lay_out([sequence.token_ids for sequence in sequences]),
        labels=shifted(lambda s: s.token_ids),
        position_ids=lay_out(positions),
        loss_mask=shifted(lambda s: s.loss_mask),
        loss_weights=shifted(lambda s: s.loss_weights),
        advantages=shifted(lambda s: s.advantages),
        rollout_logprobs=shifted(lambda s: s.rollout_logprobs),
        old_logprobs=shifted(lambda s: s.old_logprobs),
        ref_logprobs=shifted(lambda s: s.ref_logprobs),
        cu_seqlens=cu_seqlens,
        lengths=lengths,
    )


def unalign(values: Tensor, batch: MicroBatch) -> list[Tensor]:
    """Per-position values of a micro-batch back to one token-aligned [L] tensor per sequence.

    Args:
        values: shaped like ``batch.tokens``; position t concerns token t + 1.

    Returns:
        one [L] tensor per sequence, whose first element (no position predicts it) is 0.
    """
    if values.shape != batch.tokens.shape:
        raise AssertionError(f"values {tuple(values.shape)} against tokens {tuple(batch.tokens.shape)}")
    if batch.cu_seqlens is not None:
        starts = batch.cu_seqlens[: len(batch.lengths)]
        rows = [values[0, start : start + length] for start, length in zip(starts, batch.lengths, strict=True)]
    else:
        rows = [row[:length] for row, length in zip(values, batch.lengths, strict=True)]
    return [F.pad(row[:-1], (1, 0)) for row in rows]
