"""One tensor inside a file of torch's distributed checkpoints: where its bytes are.

Such a file is a row of archives as ``torch.save`` writes them, each found by offset and length.
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
    """A part of an open file."""

    def __init__(self, file: int, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        count = os.preadv(self._file, [view], self._offset + self._at) if len(view) else 0
        self._at += count
        return count


@dataclass(frozen=True)
class _Tensor:
    storage_offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _ShapeOnly(pickle.Unpickler):
    """Reads how a saved tensor lies in its storage, and calls nothing that the file names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: _Tensor(offset, tuple(shape), tuple(stride))
        return lambda *_, **__: None

    def persistent_load(self, pid: Any) -> None:
        return None


def locate(path: Path, file: int, offset: int, length: int, shape: tuple[int, ...], size: int) -> int:
    """Place in the file of the first byte of a saved tensor.

    Args:
        path: named in errors.
        file: open for reading.
        offset, length: of the archive.
        shape, size: that the tensor must have, and its bytes.

    Raises:
        ConversionError: this is no such archive, or the tensor lies in it otherwise than in order.
    """
    try:
        archive = zipfile.ZipFile(_Window(file, offset, length))
        members = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
        pickled, storage = members["data.pkl"], members["data/0"]
        start = _start(file, offset, pickled)
        found = _ShapeOnly(io.BytesIO(os.pread(file, pickled.file_size, start))).load()
    except (zipfile.BadZipFile, KeyError, pickle.UnpicklingError, EOFError, struct.error) as error:
        raise ConversionError(
            f"{path}: no saved tensor at byte {offset} ({error!r}). The file is damaged or of another format."
        ) from error
    in_order = isinstance(found, _Tensor) and found.stride == _row_major(found.shape)
    if not in_order or found.shape != shape or storage.file_size < size or storage.compress_type:
        raise ConversionError(f"{path}: the tensor at byte {offset} is {found}, expected {shape} in order.")
    return _start(file, offset, storage) + found.storage_offset * (size // max(1, _count(shape)))


def _start(file: int, offset: int, info: zipfile.ZipInfo) -> int:
    header = offset + info.header_offset
    name, extra = LOCAL_HEADER.unpack(os.pread(file, LOCAL_HEADER.size, header))
    return header + LOCAL_HEADER.size + name + extra


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(_count(shape[dim + 1 :]) for dim in range(len(shape)))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


def is_intact(file: int, offset: int, length: int) -> bool:
    """Whether every member of the archive there agrees with its checksum.

    Args:
        file: open descriptor.
    """
    try:
        with zipfile.ZipFile(io.BufferedReader(_Window(file, offset, length))) as archive:
            return archive.testzip() is None
    except zipfile.BadZipFile:
        return False
