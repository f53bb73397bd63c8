"""Tensors to and from bytes of a file, without mapping the file: mapped pages would count as this process's memory."""

import os

import torch
from torch import Tensor

from megatron_rl.errors import ConversionError


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory, writable."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def read_into(tensor: Tensor, file: int, offset: int, path: object) -> None:
    """Fill a contiguous tensor from a place in an open file.

    Raises:
        ConversionError: the file ends before.
    """
    view = bytes_of(tensor)
    at = 0
    while at < len(view):
        count = os.preadv(file, [view[at:]], offset + at)
        if count == 0:
            raise ConversionError(f"{path} ends at byte {offset + at}, {len(view) - at} too early. Fetch it again.")
        at += count


def write_at(file: int, data: memoryview, offset: int) -> None:
    """Write all of it to a place in an open file."""
    at = 0
    while at < len(data):
        at += os.pwrite(file, data[at:], offset + at)


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize
