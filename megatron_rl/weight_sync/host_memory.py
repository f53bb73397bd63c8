"""Memory of the other ranks of a host, read in place: one copy, where a message over loopback makes three or more.

Linux lets a process read another of the same user (process_vm_readv); MPI libraries move large messages so. For CPU
tensors only: on GPUs NCCL finds the shortest way itself.
"""

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.errors import WeightSyncError
from megatron_rl.weights.layout import Box, box_shape

# Linux: runs of memory that one call takes, and less than the bytes that it takes
MOST_RUNS = 1024
MOST_BYTES = 2**30


@dataclass(frozen=True)
class RemoteTensor:
    """Where another process of this host has a tensor of 1 or 2 dimensions."""

    pid: int
    address: int
    strides: tuple[int, ...]
    """In bytes."""

    @classmethod
    def of(cls, tensor: Tensor) -> "RemoteTensor":
        """This process's tensor, for others to read while it lives and nobody writes to it."""
        return cls(os.getpid(), tensor.data_ptr(), _strides(tensor))

    def read(self, box: Box, into: Tensor) -> None:
        """Copy a box.

        Args:
            into: of the box's shape, with its last dimension in one run.

        Raises:
            WeightSyncError: the other process is gone, or may not be read.
        """
        rows, width = (1, *box_shape(box))[-2:]
        width *= into.element_size()
        theirs = self.address + sum(start * stride for (start, _), stride in zip(box, self.strides, strict=True))
        steps = ((0, *self.strides)[-2], (0, *_strides(into))[-2])
        if rows == 1 or steps == (width, width):
            total = rows * width
            for first in range(0, total, MOST_BYTES):
                length = torch.tensor([min(MOST_BYTES, total - first)])
                self._copy(torch.tensor([theirs + first]), torch.tensor([into.data_ptr() + first]), length)
            return
        for start in range(0, rows, MOST_RUNS):
            places = torch.arange(start, min(start + MOST_RUNS, rows))
            lengths = torch.full_like(places, width)
            self._copy(theirs + steps[0] * places, into.data_ptr() + steps[1] * places, lengths)

    def _copy(self, theirs: Tensor, mine: Tensor, lengths: Tensor) -> None:
        """Runs of memory: addresses there and here, and bytes, [n] int64 each."""
        here, there = torch.stack([mine, lengths], 1), torch.stack([theirs, lengths], 1)  # arrays of struct iovec
        count = lengths.numel()
        done = _process_vm_readv()(self.pid, here.data_ptr(), count, there.data_ptr(), count, 0)
        if done != int(lengths.sum()):
            raise WeightSyncError(
                f"process {self.pid} of this host could not be read: {os.strerror(ctypes.get_errno())}. "
                "Has that rank ended?"
            )


class Readable(Protocol):
    """A parameter of another rank."""

    def read(self, box: Box, into: Tensor) -> None:
        """Copy a box."""
        ...


Neighbours = Mapping[int, Mapping[str, Readable]]
"""For each rank its parameters; empty: they come as messages."""

Meeting = Callable[[Mapping[str, Tensor], Collection[int], Any], AbstractContextManager[Neighbours]]
"""A way to the parameters of other ranks, as long as it is open: ``meet_neighbours`` is one."""


@contextmanager
def meet_nobody(parameters: Mapping[str, Tensor], sources: Collection[int], group: Any) -> Iterator[Neighbours]:
    """All comes as messages."""
    yield {}


@contextmanager
def meet_neighbours(parameters: Mapping[str, Tensor], sources: Collection[int], group: Any) -> Iterator[Neighbours]:
    """Where every rank has its parameters, if all ranks may read those that they have to; collective.

    Args:
        parameters: of this rank, not to be written to before all ranks are done.
        sources: ranks of this host that this rank has to read.
        group: all ranks.
    """
    neighbours = _find(parameters, sources, group)
    try:
        yield neighbours
    finally:  # also of a rank that failed: the others wait for it here
        if neighbours:
            dist.barrier(group)  # this rank's shards must stay as they are until all have read them


def _find(parameters: Mapping[str, Tensor], sources: Collection[int], group: Any) -> Neighbours:
    if sys.platform != "linux" or any(tensor.device.type != "cpu" for tensor in parameters.values()):
        return {}
    # a process of the same number in another container does not have this
    secret = torch.tensor([int.from_bytes(os.urandom(7))])
    mine = (secret.item(), RemoteTensor.of(secret), {name: RemoteTensor.of(one) for name, one in parameters.items()})
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, mine, group=group)
    can_be_read = all(one.ndim in (1, 2) and one.stride(-1) == 1 for one in parameters.values())
    may_read = all(_has(told[rank][1], told[rank][0]) for rank in sources)
    agreed = torch.tensor([can_be_read and may_read], dtype=torch.int32)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=group)
    return {rank: theirs for rank, (_, _, theirs) in enumerate(told)} if agreed.item() else {}


def _has(where: RemoteTensor, secret: int) -> bool:
    found = torch.zeros(1, dtype=torch.int64)
    try:
        where.read(((0, 1),), found)
    except WeightSyncError:
        return False
    return found.item() == secret


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tuple(stride * tensor.element_size() for stride in tensor.stride())


@functools.cache
def _process_vm_readv() -> Any:
    call = ctypes.CDLL(None, use_errno=True).process_vm_readv
    call.restype = ctypes.c_ssize_t
    call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
    return call
