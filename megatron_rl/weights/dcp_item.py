"""Locate the bytes of one tensor inside a file of a torch distributed checkpoint.

Such a file is a sequence of archives written by ``torch.save``, each addressed by offset and length.
"""

import io
import os
import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.errors import ConversionError

LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of name and extra field, at the end of a zip member's 30 byte header


class _Window(io.RawIOBase):
    """A byte range of an open file, as a file of its own."""

    def __init__(self, file: int, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._position)]
        count = os.preadv(self._file, [view], self._offset + self._position) if len(view) else 0
        self._position += count
        return count


@dataclass(frozen=True)
class _Tensor:
    """Offset in the storage, shape and strides of a saved tensor, in elements."""

    storage_offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _ShapeOnly(pickle.Unpickler):
    """Unpickles how a saved tensor is laid out in its storage, without calling anything that the file names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: _Tensor(offset, tuple(shape), tuple(stride))
        return lambda *_, **__: None

    def persistent_load(self, pid: Any) -> None:
        return None


def locate(path: Path, file: int, offset: int, length: int, shape: tuple[int, ...], size: int) -> int:
    """Return the offset in the file of the first byte of a saved tensor.

    Args:
        path: path of the file, for error messages.
        file: descriptor open for reading.
        offset, length: byte range of the archive.
        shape: expected shape of the tensor.
        size: expected number of bytes of the tensor.

    Raises:
        ConversionError: the byte range is not such an archive, or the tensor is not contiguous in it.
    """
    try:
        archive = zipfile.ZipFile(_Window(file, offset, length))
        members = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
        pickled, storage = members["data.pkl"], members["data/0"]
        start = _start(file, offset, pickled)
        tensor = _ShapeOnly(io.BytesIO(os.pread(file, pickled.file_size, start))).load()
    except (zipfile.BadZipFile, KeyError, pickle.UnpicklingError, EOFError, struct.error) as error:
        raise ConversionError(
            f"{path}: no saved tensor at byte {offset} ({error!r}). The file is damaged or has another format."
        ) from error
    is_contiguous = isinstance(tensor, _Tensor) and tensor.stride == _row_major(tensor.shape)
    if not is_contiguous or tensor.shape != shape or storage.file_size < size or storage.compress_type:
        raise ConversionError(f"{path}: the tensor at byte {offset} is {tensor}, expected shape {shape}, contiguous.")
    return _start(file, offset, storage) + tensor.storage_offset * (size // max(1, _count(shape)))


def _start(file: int, offset: int, info: zipfile.ZipInfo) -> int:
    """Offset in the file of the first byte of a member of the archive at ``offset``."""
    header = offset + info.header_offset
    name, extra = LOCAL_HEADER.unpack(os.pread(file, LOCAL_HEADER.size, header))
    return header + LOCAL_HEADER.size + name + extra


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(_count(shape[dim + 1 :]) for dim in range(len(shape)))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


def is_intact(file: int, offset: int, length: int) -> bool:
    """Whether every member of an archive matches its checksum.

    Args:
        file: descriptor open for reading.
        offset, length: byte range of the archive.
    """
    try:
        with zipfile.ZipFile(io.BufferedReader(_Window(file, offset, length))) as archive:
            return archive.testzip() is None
    except zipfile.BadZipFile:
        return False
