"""The share of a micro-batch that one context-parallel rank computes.

Every sequence is cut into 2 x size chunks, and rank r takes chunks r and 2 x size - 1 - r, so that
all ranks have the same work under causal attention. Source: the load-balanced split of Megatron-Core
and Transformer Engine.
"""

from itertools import pairwise

import torch
from torch import Tensor

from megatron_rl.types import MicroBatch


def context_indices(cu_seqlens: tuple[int, ...], rank: int, size: int) -> Tensor:
    """[T / size] int64: the packed positions of a rank, in the order in which it holds them.

    Args:
        cu_seqlens: [S + 1] starts of the sequences and the end; every length is a multiple of 2 x size.
    """
    spans = []
    for start, stop in pairwise(cu_seqlens):
        chunk, rest = divmod(stop - start, 2 * size)
        assert rest == 0, f"a sequence of {stop - start} positions is not a multiple of 2 x {size}"
        for number in (rank, 2 * size - 1 - rank):
            spans.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
    return torch.cat(spans)


def context_share(batch: MicroBatch, rank: int, size: int) -> MicroBatch:
    """Select the rank's columns of every tensor; cu_seqlens and lengths still describe the whole batch."""
    if size == 1:
        return batch
    # the rows of a padded batch are one span of the padded length
    cu_seqlens = batch.cu_seqlens if batch.cu_seqlens is not None else (0, batch.tokens.size(1))
    indices = context_indices(cu_seqlens, rank, size)
    return batch.map_tensors(lambda tensor: tensor[:, indices])


def restore_order(cu_seqlens: tuple[int, ...], size: int) -> Tensor:
    """[T] int64: index of each packed position in the concatenated shares of all ranks."""
    return torch.cat([context_indices(cu_seqlens, rank, size) for rank in range(size)]).argsort()
