"""Convert a Megatron distributed checkpoint to a complete Hugging Face folder.

The offset of every tensor is known before the first one is written, so threads and processes write tensors of one file
concurrently. OUTPUT/conversion.json has the dtype, shape and SHA-256 of every tensor.
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from megatron_rl.conversion.job import Job, run_job
from megatron_rl.conversion.partial_folder import Record
from megatron_rl.conversion.ranks import Ranks
from megatron_rl.conversion.record import TensorRecord, fingerprint, write_record
from megatron_rl.conversion.to_megatron import set_dtype
from megatron_rl.conversion.work import Progress, group_by_bytes, row_pieces
from megatron_rl.errors import ConversionError
from megatron_rl.models import layout_table, read_model_spec
from megatron_rl.weights.file_bytes import bytes_of, num_bytes, read_into, write_at
from megatron_rl.weights.hf_files import DTYPES, INDEX_NAME, SINGLE_NAME, copy_model_files
from megatron_rl.weights.layout import check_each_once, hf_shapes
from megatron_rl.weights.megatron_files import MegatronReader

UNIT_BYTES = 2**27
"""Bytes of tensors in one unit of work."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Tensor:
    """A tensor to write; ``offset`` is in bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    offset: int

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.shape, self.dtype)

    @property
    def row_bytes(self) -> int:
        return num_bytes(self.shape[1:], self.dtype)


def convert_to_hf(
    source: Path,
    target: Path,
    *,
    like: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    workers: int,
    ranks: Ranks,
    unit_bytes: int = UNIT_BYTES,
) -> None:
    """Convert a Megatron checkpoint to a Hugging Face folder; collective over the ranks.

    Args:
        source: Megatron checkpoint.
        target: folder to create.
        like: folder with config.json, tokenizer and chat template of the model.
        dtype: dtype of the output; None: dtype of the input.
        max_shard_bytes: maximum bytes of tensors in one safetensors file.
        workers: threads of each rank.
        unit_bytes: bytes of tensors in one unit of work; an interrupted conversion repeats incomplete units.

    Raises:
        ConversionError: the input is damaged, incomplete or of another model than config.json, or the output cannot
            be written.
    """
    table = layout_table(read_model_spec(like), 1)
    check_each_once(table)
    reader = MegatronReader(source, table)
    tensors, headers = _plan_files(reader, list(hf_shapes(table)), dtype, max_shard_bytes)
    units = group_by_bytes([tensor.num_bytes for tensor in tensors], unit_bytes)
    plan = {
        "to": "hf",
        "source": fingerprint(reader.checkpoint),
        "like": fingerprint(like) if like != source else {},
        "dtype": str(dtype),
        "max_shard_bytes": max_shard_bytes,
        "num_units": len(units),
    }
    members = [[tensors[index] for index in unit] for unit in units]

    def write(folder: Path, unit: int, progress: Progress) -> Record:
        return {"tensors": {tensor.name: _write_tensor(folder, tensor, reader, progress) for tensor in members[unit]}}

    def complete(folder: Path, records: list[Record]) -> None:
        copy_model_files(like, folder)
        if dtype is not None:
            set_dtype(folder / "config.json", dtype)
        if len(headers) > 1:
            total = sum(tensor.num_bytes for tensor in tensors)
            index = {"metadata": {"total_size": total}, "weight_map": {tensor.name: tensor.file for tensor in tensors}}
            (folder / INDEX_NAME).write_text(json.dumps(index, indent=2))
        write_record(folder, records)

    job = Job(
        title="to Hugging Face",
        plan=plan,
        sizes=[sum(tensor.num_bytes for tensor in unit) for unit in members],
        prepare=lambda folder: _make_files(folder, tensors, headers),
        write=write,
        is_intact=lambda folder, unit, record: _is_whole(folder, members[unit], record),
        complete=complete,
    )
    run_job(job, target, workers=workers, ranks=ranks)


def _plan_files(
    reader: MegatronReader, names: Sequence[str], dtype: torch.dtype | None, max_shard_bytes: int
) -> tuple[list[_Tensor], dict[str, bytes]]:
    """Plan the file and offset of every tensor, and the safetensors header of every file."""
    types = {name: dtype or reader.dtype(name) for name in names}
    lengths_of = {name: num_bytes(reader.shape(name), types[name]) for name in names}
    shards = group_by_bytes(list(lengths_of.values()), max_shard_bytes)
    tensors: list[_Tensor] = []
    headers: dict[str, bytes] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # wider dtypes first, so that every tensor is aligned to its element size
        members = sorted((names[index] for index in shard), key=lambda name: -types[name].itemsize)
        ends = list(accumulate(lengths_of[name] for name in members))
        entries = {
            name: {
                "dtype": _NAMES[types[name]],
                "shape": reader.shape(name),
                "data_offsets": [end - lengths_of[name], end],
            }
            for name, end in zip(members, ends, strict=True)
        }
        text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        headers[file] = struct.pack("<Q", len(text)) + text
        tensors += [
            _Tensor(name, reader.shape(name), types[name], file, len(headers[file]) + end - lengths_of[name])
            for name, end in zip(members, ends, strict=True)
        ]
    return tensors, headers


def _make_files(folder: Path, tensors: Sequence[_Tensor], headers: Mapping[str, bytes]) -> None:
    """Create every file with its header and its final length."""
    for file, header in headers.items():
        length = max(tensor.offset + tensor.num_bytes for tensor in tensors if tensor.file == file)
        descriptor = os.open(folder / file, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            write_at(descriptor, memoryview(header), 0)
            os.truncate(descriptor, length)
        finally:
            os.close(descriptor)


def _write_tensor(folder: Path, tensor: _Tensor, reader: MegatronReader, progress: Progress) -> TensorRecord:
    digest = hashlib.sha256()
    descriptor = os.open(folder / tensor.file, os.O_WRONLY)
    try:
        for first, stop in row_pieces(tensor.shape[0], tensor.row_bytes):
            rows = reader.read(tensor.name, (slice(first, stop),)).to(tensor.dtype)
            data = bytes_of(rows)
            digest.update(data)
            write_at(descriptor, data, tensor.offset + first * tensor.row_bytes)
            progress.add(len(data))
    finally:
        os.close(descriptor)
    return TensorRecord(
        dtype=str(tensor.dtype).removeprefix("torch."), shape=list(tensor.shape), sha256=digest.hexdigest()
    )


def _is_whole(folder: Path, tensors: Sequence[_Tensor], record: Record) -> bool:
    """Whether every tensor of a unit has its recorded hash on disk."""
    return all(_hash_of(folder / tensor.file, tensor) == record["tensors"][tensor.name]["sha256"] for tensor in tensors)


def _hash_of(path: Path, tensor: _Tensor) -> str | None:
    """SHA-256 of a tensor in a file; None if the file is missing or too short."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    digest = hashlib.sha256()
    try:
        for first, stop in row_pieces(tensor.shape[0], tensor.row_bytes):
            rows = torch.empty((stop - first, *tensor.shape[1:]), dtype=tensor.dtype)
            read_into(rows, descriptor, tensor.offset + first * tensor.row_bytes, path)
            digest.update(bytes_of(rows))
    except ConversionError:  # the file is too short; the tensor is written again
        return None
    finally:
        os.close(descriptor)
    return digest.hexdigest()
