"""Read parameters directly from the memory of other ranks of the same host.

This makes one copy, where a message over loopback makes three or more. Linux lets a process read the memory of another
process of the same user (process_vm_readv); MPI libraries transfer large messages this way. For CPU tensors only: on
GPUs NCCL chooses the fastest path itself.
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

# Linux's limit of segments (struct iovec) in one call, and a number of bytes below its limit
MAX_SEGMENTS = 1024
MAX_BYTES = 2**30


@dataclass(frozen=True)
class RemoteTensor:
    """Address of a tensor of 1 or 2 dimensions in a process of this host."""

    pid: int
    address: int
    strides: tuple[int, ...]
    """In bytes."""

    @classmethod
    def of(cls, tensor: Tensor) -> "RemoteTensor":
        """Describe a tensor of this process; others may read it until it is freed or written to."""
        return cls(os.getpid(), tensor.data_ptr(), _strides(tensor))

    def read(self, box: Box, into: Tensor) -> None:
        """Copy a box of the tensor.

        Args:
            into: tensor of the box's shape whose last dimension is contiguous.

        Raises:
            WeightSyncError: the other process has exited, or this process may not read its memory.
        """
        rows, width = (1, *box_shape(box))[-2:]
        width *= into.element_size()
        remote = self.address + sum(start * stride for (start, _), stride in zip(box, self.strides, strict=True))
        steps = ((0, *self.strides)[-2], (0, *_strides(into))[-2])
        if rows == 1 or steps == (width, width):
            total = rows * width
            for first in range(0, total, MAX_BYTES):
                length = torch.tensor([min(MAX_BYTES, total - first)])
                self._copy(torch.tensor([remote + first]), torch.tensor([into.data_ptr() + first]), length)
            return
        for start in range(0, rows, MAX_SEGMENTS):
            indices = torch.arange(start, min(start + MAX_SEGMENTS, rows))
            lengths = torch.full_like(indices, width)
            self._copy(remote + steps[0] * indices, into.data_ptr() + steps[1] * indices, lengths)

    def _copy(self, remote: Tensor, local: Tensor, lengths: Tensor) -> None:
        """Copy segments of memory.

        Args:
            remote, local: start addresses in the other process and in this one, [n] int64.
            lengths: bytes of each segment, [n] int64.
        """
        local_iov, remote_iov = torch.stack([local, lengths], 1), torch.stack([remote, lengths], 1)  # struct iovec[n]
        count = lengths.numel()
        copied = _process_vm_readv()(self.pid, local_iov.data_ptr(), count, remote_iov.data_ptr(), count, 0)
        if copied != int(lengths.sum()):
            raise WeightSyncError(
                f"process {self.pid} of this host could not be read: {os.strerror(ctypes.get_errno())}. "
                "Check whether that rank has exited."
            )


class PeerParameter(Protocol):
    """A parameter of another rank that this rank can read."""

    def read(self, box: Box, into: Tensor) -> None:
        """Copy a box of the parameter into a tensor of the box's shape."""
        ...


PeerParameters = Mapping[int, Mapping[str, PeerParameter]]
"""Rank -> parameter name -> parameter; empty if no rank can be read directly and all boxes are sent as messages."""

PeerAccess = Callable[[Mapping[str, Tensor], Collection[int], Any], AbstractContextManager[PeerParameters]]
"""(parameters, sources, group) -> context in which this rank can read parameters of other ranks.

``expose_host_memory`` documents the arguments.
"""


@contextmanager
def no_peer_access(parameters: Mapping[str, Tensor], sources: Collection[int], group: Any) -> Iterator[PeerParameters]:
    """Give no direct access: all boxes are sent as messages."""
    yield {}


@contextmanager
def expose_host_memory(
    parameters: Mapping[str, Tensor], sources: Collection[int], group: Any
) -> Iterator[PeerParameters]:
    """Let all ranks of a host read each other's parameters from memory; collective.

    Yields the parameters of every rank, or no rank's if any rank cannot read all of its sources. In the first case, the
    context ends with a barrier.

    Args:
        parameters: this rank's parameters; they must not be written to inside the context.
        sources: ranks of this host that this rank reads.
        group: process group of all ranks.
    """
    peers = _exchange_addresses(parameters, sources, group)
    try:
        yield peers
    finally:  # also after a failure, because the other ranks wait in the barrier
        if peers:
            dist.barrier(group)  # this rank's shards must stay unchanged until all ranks have read them


def _exchange_addresses(parameters: Mapping[str, Tensor], sources: Collection[int], group: Any) -> PeerParameters:
    if sys.platform != "linux" or any(tensor.device.type != "cpu" for tensor in parameters.values()):
        return {}
    # identifies the process: another container may have a process with the same pid
    secret = torch.tensor([int.from_bytes(os.urandom(7))])
    addresses = {name: RemoteTensor.of(tensor) for name, tensor in parameters.items()}
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (secret.item(), RemoteTensor.of(secret), addresses), group=group)
    can_be_read = all(tensor.ndim in (1, 2) and tensor.stride(-1) == 1 for tensor in parameters.values())
    may_read = all(_contains(gathered[rank][1], gathered[rank][0]) for rank in sources)
    agreed = torch.tensor([can_be_read and may_read], dtype=torch.int32)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=group)
    return {rank: addresses for rank, (_, _, addresses) in enumerate(gathered)} if agreed.item() else {}


def _contains(remote: RemoteTensor, secret: int) -> bool:
    """Whether the remote tensor can be read and contains ``secret``."""
    value = torch.zeros(1, dtype=torch.int64)
    try:
        remote.read(((0, 1),), value)
    except WeightSyncError:
        return False
    return value.item() == secret


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides in bytes."""
    return tuple(stride * tensor.element_size() for stride in tensor.stride())


@functools.cache
def _process_vm_readv() -> Any:
    call = ctypes.CDLL(None, use_errno=True).process_vm_readv
    call.restype = ctypes.c_ssize_t
    call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
    return call
