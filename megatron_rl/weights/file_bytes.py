"""Read and write tensors as bytes of a file, without memory-mapping it.

Mapped pages would count as this process's memory.
"""

import os

import torch
from torch import Tensor

from megatron_rl.errors import ConversionError


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a writable view of the memory of a contiguous tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def read_into(tensor: Tensor, file: int, offset: int, path: object) -> None:
    """Fill a contiguous tensor with the bytes of an open file from an offset on.

    Args:
        file: descriptor open for reading.
        path: path of the file, for error messages.

    Raises:
        ConversionError: the file is too short.
    """
    view = bytes_of(tensor)
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], offset + done)
        if count == 0:
            missing = len(view) - done
            raise ConversionError(f"{path} ends at byte {offset + done}, {missing} bytes too early. Fetch it again.")
        done += count


def write_at(file: int, data: memoryview, offset: int) -> None:
    """Write all bytes to an open file at an offset."""
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Number of bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize
