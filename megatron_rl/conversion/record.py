"""conversion.json: what was converted, so that it can be checked later."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from megatron_rl.errors import ConversionError

RECORD = "conversion.json"


class TensorRecord(TypedDict):
    """One Hugging Face tensor."""

    dtype: str
    shape: list[int]
    sha256: str
    """Of its bytes in this type, rows in order."""


def fingerprint(folder: Path) -> dict[str, list[int]]:
    """Size and time of every file, by which an interrupted conversion knows its input again."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            status = path.stat()
            found[str(path.relative_to(folder))] = [status.st_size, status.st_mtime_ns]
    return found


def write_record(folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Gather the tensors that the units of work name."""
    tensors = {name: tensor for record in records for name, tensor in record["tensors"].items()}
    (folder / RECORD).write_text(json.dumps({"tensors": tensors}, indent=1))


def read_record(folder: Path) -> dict[str, TensorRecord]:
    """The tensors of a converted folder.

    Raises:
        ConversionError: it has no record, or a damaged one.
    """
    try:
        tensors: dict[str, TensorRecord] = json.loads((folder / RECORD).read_text())["tensors"]
    except (OSError, ValueError, KeyError) as error:
        raise ConversionError(f"{folder / RECORD} cannot be read: {error!r}. Convert again.") from error
    return tensors
