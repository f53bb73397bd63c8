"""Read rows from files, data sets, generated tasks and custom readers."""

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_rl.config.data import RowsSection
from megatron_rl.config.plugins import load_symbol
from megatron_rl.data.generated import TASKS
from megatron_rl.data.schemas import check_licence, read_schema
from megatron_rl.errors import DataError

Row = Mapping[str, Any]
SourceReader = Callable[[RowsSection], Iterable[Row]]


def read_rows(source: RowsSection) -> list[Row]:
    """Read all rows of a source, in its order, up to its limit.

    Raises:
        DataError: the file or data set is missing, damaged, empty or of another schema, or its licence forbids
            commercial use.
    """
    check_licence(source.path, source.schema, allow_noncommercial=source.allow_noncommercial)
    reader = load_symbol(source.kind, READERS, "data source kind")
    rows = list(islice(reader(source), source.limit))
    if not rows:
        raise DataError(
            f"data source {source.path or source.kind} (split {source.split!r}) has no rows. "
            "Choose a source or split that has some."
        )
    return rows if source.schema is None else read_schema(rows, source.schema, path=source.path)


def read_jsonl(source: RowsSection) -> Iterable[Row]:
    """Read a JSON Lines file, one object per line; empty lines are skipped."""
    path = _existing_file(source)
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not JSON ({error}). Each line must be one object.") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: {type(row).__name__}, expected an object with columns.")
            yield row


def read_parquet(source: RowsSection) -> Iterable[Row]:
    """Read a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    path = _existing_file(source)
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error


def read_datasets(source: RowsSection) -> Iterable[Row]:
    """Read a data set with the ``datasets`` library: a hub id, a local folder, or a data set saved to disk."""
    import datasets

    assert source.path is not None
    try:
        if (Path(source.path) / "dataset_info.json").exists() or (Path(source.path) / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(source.path)
            return saved[source.split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except (
        OSError,  # missing, no connection, or rejected by the hub
        KeyError,
        ValueError,
        RuntimeError,  # data sets with a loading script
        datasets.exceptions.DatasetNotFoundError,
    ) as error:
        raise DataError(
            f"data set {source.path!r} (name {source.name!r}, split {source.split!r}) cannot be loaded: {error}"
        ) from error


def read_task(source: RowsSection) -> Iterable[Row]:
    """Generate the rows of a task."""
    assert source.path is not None
    task = load_symbol(source.path, TASKS, "data source path (task)")
    try:
        return task(**source.options).rows(source.split)
    except TypeError as error:
        raise DataError(f"task {source.path}: {error}. Check the data source's options.") from error


READERS: dict[str, SourceReader] = {
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "datasets": read_datasets,
    "task": read_task,
}


def _existing_file(source: RowsSection) -> Path:
    assert source.path is not None
    path = Path(source.path)
    if not path.is_file():
        raise DataError(
            f"data file {path} does not exist. Set the path of the source: data.train or data.validation of a run, "
            "data.TASK or examples.TASK of an evaluation."
        )
    return path
