"""Convert a Hugging Face folder to a Megatron distributed checkpoint.

OUTPUT/release/                          the tensors (torch_dist), one .distcp file per unit of work
OUTPUT/latest_checkpointed_iteration.txt "release", which Megatron-LM's --load reads
OUTPUT/config.json, tokenizer files …    copied from the input, so that the folder can be a model.path
OUTPUT/conversion.json                   dtype, shape and SHA-256 of every Hugging Face tensor
"""

import hashlib
import io
import json
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_rl.conversion.job import Job, run_job
from megatron_rl.conversion.partial_folder import Record
from megatron_rl.conversion.ranks import Ranks
from megatron_rl.conversion.record import TensorRecord, fingerprint, write_record
from megatron_rl.conversion.work import Progress, group_by_bytes, row_pieces
from megatron_rl.errors import ConversionError
from megatron_rl.models import ModelSpec, layout_table, read_model_spec
from megatron_rl.models.table import EMBEDDING, LM_HEAD, ignored_names
from megatron_rl.weights.dcp_item import is_intact
from megatron_rl.weights.file_bytes import bytes_of, num_bytes
from megatron_rl.weights.hf_files import HFReader, check_against_table, copy_model_files
from megatron_rl.weights.layout import Layout, Slice, check_each_once, fill_shard, hf_shapes
from megatron_rl.weights.megatron_files import METADATA, TRACKER, VOCABULARY
from megatron_rl.weights.megatron_keys import StoredKey, written_form

ITERATION = "release"
UNIT_BYTES = 2**28
# bytes of one stored chunk of a tensor; readers open each chunk separately
ITEM_BYTES = 2**23
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# modules that write an extra state with Transformer Engine; it is empty without FP8
EXTRA_STATES = ("self_attention.core_attention", "self_attention.linear_qkv", "self_attention.linear_proj")
EXTRA_STATES_DENSE = ("mlp.linear_fc1", "mlp.linear_fc2")
EXTRA_STATES_EXPERT = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")


@dataclass(frozen=True)
class _Parameter:
    """A Megatron parameter to write, and the Hugging Face tensors that it is composed of."""

    name: str
    stored: StoredKey
    shape: tuple[int, ...]
    slices: Sequence[Slice]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.shape, self.dtype)


def convert_to_megatron(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype | None,
    workers: int,
    ranks: Ranks,
    unit_bytes: int = UNIT_BYTES,
) -> None:
    """Convert a Hugging Face folder to a Megatron checkpoint; collective over the ranks.

    Args:
        source: Hugging Face folder.
        target: folder to create.
        dtype: dtype of the output; None: dtype of the input.
        workers: threads of each rank.
        unit_bytes: bytes of one file, which is one unit of work; an interrupted conversion repeats incomplete units.

    Raises:
        ConversionError: the input is damaged, unsupported or inconsistent, or the output cannot be written.
    """
    spec = read_model_spec(source)
    reader = HFReader(source)
    table = layout_table(spec, 1)
    check_each_once(table)
    check_against_table(reader, hf_shapes(table), ignored_names(spec))
    _check_tied(reader, spec, ranks)
    parameters = [
        _parameter(name, layout, reader, spec, dtype) for name, layout in table.items() if _is_kept(name, spec)
    ]
    units = group_by_bytes([parameter.num_bytes for parameter in parameters], unit_bytes)
    plan = {"to": "megatron", "source": fingerprint(source), "dtype": str(dtype), "num_units": len(units)}
    members = [[parameters[index] for index in unit] for unit in units]

    def complete(folder: Path, records: list[Record]) -> None:
        _write_metadata(folder / ITERATION, parameters, records, spec)
        copy_model_files(source, folder)
        if dtype is not None:
            set_dtype(folder / "config.json", dtype)
        write_record(folder, records)
        (folder / TRACKER).write_text(ITERATION)

    job = Job(
        title="to Megatron",
        plan=plan,
        sizes=[sum(parameter.num_bytes for parameter in unit) for unit in members],
        prepare=lambda folder: (folder / ITERATION).mkdir(exist_ok=True),
        write=lambda folder, unit, progress: _write_unit(folder / ITERATION, unit, members[unit], reader, progress),
        is_intact=lambda folder, unit, record: _is_whole(folder / ITERATION / record["file"], record),
        complete=complete,
    )
    run_job(job, target, workers=workers, ranks=ranks)


def set_dtype(config: Path, dtype: torch.dtype) -> None:
    """Set the dtype of the converted weights in a config.json."""
    content = json.loads(config.read_text())
    key = "dtype" if "dtype" in content else "torch_dtype"
    config.write_text(json.dumps({**content, key: str(dtype).removeprefix("torch.")}, indent=2))


def _is_kept(name: str, spec: ModelSpec) -> bool:
    """Whether the checkpoint stores a parameter: all but a tied output layer."""
    return not (spec.tied_embeddings and name == VOCABULARY[1])


def _parameter(name: str, layout: Layout, reader: HFReader, spec: ModelSpec, dtype: torch.dtype | None) -> _Parameter:
    slices = layout.slices(0, 1)
    types = {reader.dtype(piece.hf_name) for piece in slices}
    if dtype is None and len(types) > 1:
        raise ConversionError(
            f"{reader.folder}: {', '.join(dict.fromkeys(piece.hf_name for piece in slices))} become one Megatron "
            f"parameter, but have types {sorted(map(str, types))}. Give --dtype to convert them."
        )
    stored = written_form(name, experts=spec.moe is not None)
    return _Parameter(name, stored, layout.shape(1), slices, dtype or types.pop())


def _check_tied(reader: HFReader, spec: ModelSpec, ranks: Ranks) -> None:
    """Check that a tied model's output layer, if the folder has one, equals the embedding."""

    def compare() -> None:
        if not ranks.is_main or not spec.tied_embeddings or LM_HEAD not in reader.names():
            return
        shape = reader.shape(EMBEDDING)
        same = reader.shape(LM_HEAD) == shape and all(
            torch.equal(reader.read(EMBEDDING, (slice(a, b),)), reader.read(LM_HEAD, (slice(a, b),)))
            for a, b in row_pieces(shape[0], num_bytes(shape[1:], reader.dtype(EMBEDDING)))
        )
        if not same:
            raise ConversionError(
                f"{reader.folder}: config.json says tie_word_embeddings=true, but {LM_HEAD} differs from {EMBEDDING}. "
                "Set tie_word_embeddings=false or remove the tensor, whichever is wrong."
            )

    ranks.together(compare)


def _write_unit(
    folder: Path, unit: int, parameters: Sequence[_Parameter], reader: HFReader, progress: Progress
) -> Record:
    """Write one file; returns the record of its contents."""
    name = f"__{unit}_0.distcp"
    temporary = folder / f"{name}.new"
    items, hashes = [], _Hashes(parameters)
    with temporary.open("wb") as file:
        for parameter in parameters:
            row_bytes = num_bytes(parameter.shape[1:], parameter.dtype)
            for first, stop in row_pieces(parameter.shape[0], row_bytes, ITEM_BYTES):
                piece = _read_rows(parameter, first, stop, reader, hashes)
                start = file.tell()
                torch.save(piece.view(*(1 for _ in parameter.stored.prefix), *piece.shape), file)
                items.append(
                    {"parameter": parameter.name, "rows": [first, stop], "offset": start, "length": file.tell() - start}
                )
                progress.add(piece.numel() * piece.element_size())
    os.replace(temporary, folder / name)
    return {
        "file": name,
        "bytes": (folder / name).stat().st_size,
        "items": items,
        "tensors": hashes.records(),
    }


class _Hashes:
    """SHA-256 of Hugging Face tensors whose rows are added in order."""

    def __init__(self, parameters: Sequence[_Parameter]) -> None:
        self._dtypes = {piece.hf_name: parameter.dtype for parameter in parameters for piece in parameter.slices}
        self._digests = {name: hashlib.sha256() for name in self._dtypes}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def add(self, name: str, rows: Tensor, shape: tuple[int, ...]) -> None:
        self._digests[name].update(bytes_of(rows))
        self._shapes[name] = shape

    def records(self) -> dict[str, TensorRecord]:
        return {
            name: TensorRecord(
                dtype=str(self._dtypes[name]).removeprefix("torch."),
                shape=list(self._shapes[name]),
                sha256=digest.hexdigest(),
            )
            for name, digest in self._digests.items()
        }


def _read_rows(parameter: _Parameter, first: int, stop: int, reader: HFReader, hashes: _Hashes) -> Tensor:
    """Read rows of a parameter in the output's dtype; rows that pad the vocabulary are 0."""
    shard_rows = torch.zeros((stop - first, *parameter.shape[1:]), dtype=parameter.dtype)
    clipped = [part for part in (_clip(piece, first, stop) for piece in parameter.slices) if part is not None]

    def read(name: str, index: tuple[slice, ...]) -> Tensor:
        rows = reader.read(name, index).to(parameter.dtype)
        hashes.add(name, rows, reader.shape(name))
        return rows

    fill_shard(shard_rows, clipped, read)
    return shard_rows


def _clip(piece: Slice, first: int, stop: int) -> Slice | None:
    """Part of a slice between two rows of the shard, with shard coordinates relative to the first; None if empty."""
    (start, end), *rest = piece.shard_box
    low, high = max(start, first), min(end, stop)
    if low >= high:
        return None
    shift = piece.hf_box[0][0] - start
    return Slice(piece.hf_name, ((low + shift, high + shift), *piece.hf_box[1:]), ((low - first, high - first), *rest))


def _is_whole(path: Path, record: Record) -> bool:
    """Whether a file is as it was written, by its size and the checksums that ``torch.save`` stores."""
    if not path.exists() or path.stat().st_size != record["bytes"]:
        return False
    with path.open("rb") as file:
        return all(is_intact(file.fileno(), item["offset"], item["length"]) for item in record["items"])


def _write_metadata(folder: Path, parameters: Sequence[_Parameter], records: Sequence[Record], spec: ModelSpec) -> None:
    """Write the metadata files of a torch distributed checkpoint, which locate every chunk."""
    by_name = {parameter.name: parameter for parameter in parameters}
    depths = {1: (spec.num_layers,), 2: (spec.num_layers, spec.moe.num_experts if spec.moe else 0), 0: ()}
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for record in records:
        for item in record["items"]:
            parameter, (first, stop) = by_name[item["parameter"]], item["rows"]
            key, prefix = parameter.stored.key, parameter.stored.prefix
            entry = entries.setdefault(
                key,
                TensorStorageMetadata(
                    TensorProperties(parameter.dtype), torch.Size((*depths[len(prefix)], *parameter.shape)), []
                ),
            )
            rest = parameter.shape[1:]
            offsets = torch.Size((*prefix, first, *(0 for _ in rest)))
            sizes = torch.Size((*(1 for _ in prefix), stop - first, *rest))
            entry.chunks.append(ChunkStorageMetadata(offsets, sizes))
            index = MetadataIndex(key, offsets, len(entry.chunks) - 1)
            storage[index] = _StorageInfo(record["file"], item["offset"], item["length"])
    _write_extra_states(folder, entries, storage, spec)
    torch.save({"checkpoint_version": 3.0, "iteration": 0}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(FORMAT))
    with (folder / METADATA).open("wb") as file:
        pickle.dump(Metadata(entries, storage_data=storage), file)


def _write_extra_states(
    folder: Path, entries: dict[str, Any], storage: dict[MetadataIndex, _StorageInfo], spec: ModelSpec
) -> None:
    """Add an empty state under every key from which Megatron's modules load FP8 state, as there is none here."""
    modules = [*EXTRA_STATES, *(EXTRA_STATES_DENSE if spec.moe is None else ())]
    keys = ["decoder.final_layernorm._extra_state/shard_0_1", "output_layer._extra_state/shard_0_1"]
    if spec.qk_norm:
        modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    for layer in range(spec.num_layers):
        keys += [f"decoder.layers.{module}._extra_state/shard_{layer}_{spec.num_layers}" for module in modules]
        if spec.moe is not None:
            prefix, sizes = f"{layer}.", f"{spec.num_layers}.{spec.moe.num_experts}"
            keys += [
                f"decoder.layers.{module}._extra_state/shard_{prefix}{expert}_{sizes}"
                for module in EXTRA_STATES_EXPERT
                for expert in range(spec.moe.num_experts)
            ]
    empty_state = io.BytesIO()
    torch.save([None], empty_state)  # Megatron stores a list of the objects of a key
    (folder / "__extra_0.distcp").write_bytes(empty_state.getvalue())
    for key in keys:
        entries[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _StorageInfo("__extra_0.distcp", 0, len(empty_state.getvalue()))
