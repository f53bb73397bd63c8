"""conversion.json: record of the converted tensors, for later verification."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from megatron_rl.errors import ConversionError

RECORD = "conversion.json"


class TensorRecord(TypedDict):
    """Dtype, shape and hash of one Hugging Face tensor."""

    dtype: str
    shape: list[int]
    sha256: str
    """SHA-256 of the tensor's bytes in this dtype, in row-major order."""


def fingerprint(folder: Path) -> dict[str, list[int]]:
    """Return [size in bytes, modification time in ns] of every file; detects changes of the input on resume."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            status = path.stat()
            files[str(path.relative_to(folder))] = [status.st_size, status.st_mtime_ns]
    return files


def write_record(folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write conversion.json with the tensors in the records of all units of work."""
    tensors = {name: tensor for record in records for name, tensor in record["tensors"].items()}
    (folder / RECORD).write_text(json.dumps({"tensors": tensors}, indent=1))


def read_record(folder: Path) -> dict[str, TensorRecord]:
    """Read the records of a converted folder, by tensor name.

    Raises:
        ConversionError: the folder has no conversion.json, or it is damaged.
    """
    try:
        tensors: dict[str, TensorRecord] = json.loads((folder / RECORD).read_text())["tensors"]
    except (OSError, ValueError, KeyError) as error:
        raise ConversionError(f"{folder / RECORD} cannot be read: {error!r}. Convert again.") from error
    return tensors
