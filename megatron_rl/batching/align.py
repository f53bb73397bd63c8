"""Sequences to the tensors of one forward pass. The only place that shifts.

Outside this file index t describes token t. A model predicts token t + 1 at position t, so every
per-token array moves one place to the left here, and log-probabilities move back in ``unalign``.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.types import MicroBatch, TrainSequence


def align(
    sequences: Sequence[TrainSequence], *, packed: bool, multiple_of: int = 1, sequence_multiple_of: int = 1
) -> MicroBatch:
    """The micro-batch of some sequences.

    Args:
        sequences: each with at least one token.
        packed: [1, T] one behind the other; otherwise [S, L] padded on the right.
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
        """One place to the left; nothing moves from one sequence into the one before it."""
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
        sequence=lay_out([torch.full((length,), place) for place, length in enumerate(lengths)]),
        cu_seqlens=cu_seqlens,
        lengths=lengths,
        routing=_lay_out_routing([sequence.routing for sequence in sequences], real),
    )


def _lay_out_routing(rows: Sequence[Tensor | None], real: Tensor) -> Tensor | None:
    """[S, L, layers, k] int64 experts of every position; padding goes to the first k."""
    known = [row for row in rows if row is not None]
    if not known:
        return None
    assert len(known) == len(rows), f"{len(known)} of {len(rows)} sequences have routes"
    chosen = torch.cat(known).long()  # of the real positions, in their order
    layers, k = chosen.shape[1:]
    whole = torch.arange(k).expand(*real.shape, layers, k).clone()
    whole[real] = chosen
    return whole


def unalign(values: Tensor, batch: MicroBatch) -> list[Tensor]:
    """Per-position values of a micro-batch back to one token-aligned [L] tensor per sequence.

    Args:
        values: [1, T] or [S, L], over all context-parallel ranks; position t concerns token t + 1.

    Returns:
        one [L] tensor per sequence, whose first element (no position predicts it) is 0.
    """
    if batch.cu_seqlens is not None:
        assert values.shape == (1, batch.cu_seqlens[-1]), f"{tuple(values.shape)} against {batch.cu_seqlens[-1]} tokens"
        starts = batch.cu_seqlens[: len(batch.lengths)]
        rows = [values[0, start : start + length] for start, length in zip(starts, batch.lengths, strict=True)]
    else:
        assert values.size(0) == len(batch.lengths), f"{values.size(0)} rows against {len(batch.lengths)} sequences"
        rows = [row[:length] for row, length in zip(values, batch.lengths, strict=True)]
    return [F.pad(row[:-1], (1, 0)) for row in rows]
