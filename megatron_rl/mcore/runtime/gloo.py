"""Gloo collectives with unequal parts, which only NCCL supports; needed for tensor-parallel experts."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import mappings
from torch import Tensor

_gather = mappings._gather_along_first_dim
_reduce_scatter = mappings._reduce_scatter_along_first_dim


def gather_unequal(
    input_: Tensor, group: Any, output_split_sizes: Sequence[int] | None = None, use_global_buffer: bool = False
) -> Tensor:
    """Concatenate every rank's [n_r, ...] rows; for the exchange all ranks pad to the largest number of rows."""
    if output_split_sizes is None or group.size() == 1:
        return _gather(input_, group, output_split_sizes, use_global_buffer)
    max_rows = max(output_split_sizes)
    padding = [0, 0] * (input_.ndim - 1) + [0, max_rows - input_.size(0)]
    parts = list(torch.empty(group.size(), max_rows, *input_.shape[1:], dtype=input_.dtype))
    dist.all_gather(parts, F.pad(input_, padding), group=group)
    return torch.cat([part[:rows] for part, rows in zip(parts, output_split_sizes, strict=True)])


def reduce_scatter_unequal(
    input_: Tensor, group: Any, input_split_sizes: Sequence[int] | None = None, use_global_buffer: bool = False
) -> Tensor:
    """Return this rank's [n_r, ...] rows of the sum over ranks; computed by an all-reduce of all rows."""
    if input_split_sizes is None or group.size() == 1:
        return _reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
    whole = input_.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(whole, group=group)
    return whole.split(list(input_split_sizes))[group.rank()].contiguous()


def complete_collectives() -> None:
    """Make Megatron use these collectives if CUDA is not available."""
    if not torch.cuda.is_available():
        mappings._gather_along_first_dim = gather_unequal
        mappings._reduce_scatter_along_first_dim = reduce_scatter_unequal
