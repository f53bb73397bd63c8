"""Lay out sequences as the tensors of one forward pass. The only module that shifts per-token arrays.

Outside this file index t describes token t. A model predicts token t + 1 at position t, so every
per-token array moves one position to the left here, and log-probabilities move back in ``unalign``.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.types import MicroBatch, TrainSequence


def align(
    sequences: Sequence[TrainSequence], *, packed: bool, multiple_of: int = 1, sequence_multiple_of: int = 1
) -> MicroBatch:
    """Build the micro-batch of the given sequences.

    Args:
        sequences: each with at least one token.
        packed: [1, T], one sequence after the other; otherwise [S, L], padded on the right.
        multiple_of: T (or L) is padded to a multiple of this, as sequence parallelism needs.
        sequence_multiple_of: each packed sequence is padded to a multiple of this, as context parallelism
            needs; a divisor of ``multiple_of``.
    """
    lengths = tuple(sequence.token_ids.numel() for sequence in sequences)
    padded = [length + -length % sequence_multiple_of for length in lengths]
    width = sum(padded) if packed else max(padded)
    padding = -width % multiple_of

    def lay_out(rows: list[Tensor]) -> Tensor:
        if packed:
            if sequence_multiple_of > 1:
                rows = [F.pad(row, (0, length - row.numel())) for row, length in zip(rows, padded, strict=True)]
            return F.pad(torch.cat(rows), (0, padding))[None]
        return torch.stack([F.pad(row, (0, width + padding - row.numel())) for row in rows])

    starts = torch.tensor((0, *padded)).cumsum(0)
    last = starts[:-1] + torch.tensor(lengths) - 1

    def shifted(read: Callable[[TrainSequence], Tensor]) -> Tensor:
        """Move values one position to the left; nothing moves from one sequence into the previous one."""
        moved = F.pad(lay_out([read(sequence) for sequence in sequences])[:, 1:], (0, 1))
        if packed:
            moved[0, last] = 0
        return moved

    positions = [torch.arange(length) for length in lengths]
    cu_seqlens = None
    if packed:
        ends = torch.tensor((0, *padded, *([padding] if padding else []))).cumsum(0)
        cu_seqlens = tuple(ends.tolist())
    real = lay_out([torch.ones(length, dtype=torch.bool) for length in lengths])
    return MicroBatch(
        tokens=lay_out([sequence.token_ids for sequence in sequences]),
        labels=shifted(lambda s: s.token_ids),
        position_ids=lay_out(positions),
        real=real,
        loss_mask=shifted(lambda s: s.loss_mask),
        loss_weights=shifted(lambda s: s.loss_weights),
        advantages=shifted(lambda s: s.advantages),
        rollout_logprobs=shifted(lambda s: s.rollout_logprobs),
        rollout_weights=shifted(lambda s: s.rollout_weights),
        old_logprobs=shifted(lambda s: s.old_logprobs),
        ref_logprobs=shifted(lambda s: s.ref_logprobs),
        values=shifted(lambda s: s.values),
        returns=shifted(lambda s: s.returns),
        sequence=lay_out([torch.full((length,), index) for index, length in enumerate(lengths)]),
        cu_seqlens=cu_seqlens,
        lengths=lengths,
        routing=_lay_out_routing([sequence.routing for sequence in sequences], real),
    )


def _lay_out_routing(rows: Sequence[Tensor | None], real: Tensor) -> Tensor | None:
    """[1, T, layers, k] or [S, L, layers, k] int64: experts of every position; padding goes to the first k experts."""
    present = [row for row in rows if row is not None]
    if not present:
        return None
    assert len(present) == len(rows), f"{len(present)} of {len(rows)} sequences have routes"
    routes = torch.cat(present).long()  # of the real positions, in order
    layers, k = routes.shape[1:]
    laid_out = torch.arange(k).expand(*real.shape, layers, k).clone()
    laid_out[real] = routes
    return laid_out


def unalign(values: Tensor, batch: MicroBatch) -> list[Tensor]:
    """Convert per-position values of a micro-batch to one token-aligned [L] tensor per sequence.

    Args:
        values: [1, T] or [S, L], gathered from all context-parallel ranks; position t describes token t + 1.

    Returns:
        One [L] tensor per sequence; its first element is 0, because no position predicts the first token.
    """
    if batch.cu_seqlens is not None:
        assert values.shape == (1, batch.cu_seqlens[-1]), f"{tuple(values.shape)} against {batch.cu_seqlens[-1]} tokens"
        starts = batch.cu_seqlens[: len(batch.lengths)]
        rows = [values[0, start : start + length] for start, length in zip(starts, batch.lengths, strict=True)]
    else:
        assert values.size(0) == len(batch.lengths), f"{values.size(0)} rows against {len(batch.lengths)} sequences"
        rows = [row[:length] for row, length in zip(values, batch.lengths, strict=True)]
    return [F.pad(row[:-1], (1, 0)) for row in rows]
