"""Read Megatron's distributed checkpoints (torch_dist) under Hugging Face names.

Supported are those that this project converts or saves, and those of Megatron-LM: a GPTModel with or without an
optimizer, with layers stacked in one tensor or separate, saved under any parallel layout.
"""

import itertools
import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_rl.errors import ConversionError
from megatron_rl.weights.dcp_item import locate
from megatron_rl.weights.file_bytes import num_bytes, read_into
from megatron_rl.weights.layout import (
    Box,
    Index,
    LayoutTable,
    Slice,
    box_index,
    box_shape,
    hf_shapes,
    intersection,
    moved_box,
    relative_box,
)
from megatron_rl.weights.megatron_keys import NO_WEIGHTS, StoredKey, stored_forms

TRACKER = "latest_checkpointed_iteration.txt"
METADATA = ".metadata"
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def find_distributed_checkpoint(folder: Path) -> Path | None:
    """Return the folder with the tensors of a checkpoint, or None if there is none.

    This is the folder itself, ``policy`` in a checkpoint of this project, or the latest iteration of Megatron-LM.

    Raises:
        ConversionError: the tracker file names an iteration that does not exist.
    """
    for found in (folder, folder / "policy"):
        if (found / METADATA).exists():
            return found
    if not (folder / TRACKER).exists():
        return None
    latest = (folder / TRACKER).read_text().strip()
    found = folder / (f"iter_{int(latest):07d}" if latest.isdigit() else latest)
    if not (found / METADATA).exists():
        raise ConversionError(
            f"{folder / TRACKER} names {latest}, but {found / METADATA} is missing: the checkpoint is incomplete or "
            "not in the torch_dist format (Megatron-LM: --ckpt-format torch_dist)."
        )
    return found


def read_metadata(folder: Path) -> Metadata:
    """Read the metadata of a distributed checkpoint: which file stores which part of which tensor.

    Raises:
        ConversionError: the metadata is missing or damaged.
    """
    try:
        return FileSystemReader(folder).read_metadata()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, ValueError) as error:
        raise ConversionError(
            f"{folder / METADATA} cannot be read: {error!r}. The checkpoint is incomplete."
        ) from error


@dataclass(frozen=True)
class Chunk:
    """A box of a stored tensor, and the byte range of a file that stores it."""

    box: Box
    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class _StoredParameter:
    """How the checkpoint stores a parameter of the layout table."""

    keys: tuple[StoredKey, ...]
    rows: int
    """Number of rows of the whole parameter."""
    dtype: torch.dtype


@dataclass
class _Files:
    """Open files, and the offsets of the tensors in them."""

    descriptors: dict[Path, int] = field(default_factory=dict)
    starts: dict[tuple[Path, int], int] = field(default_factory=dict)
    """(path, offset of the archive) -> offset of the first byte of the tensor in it."""

    def open(self, path: Path) -> int:
        if path not in self.descriptors:
            self.descriptors[path] = os.open(path, os.O_RDONLY)
        return self.descriptors[path]

    def __del__(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)


class MegatronReader:
    """Reads slices of the tensors of a distributed checkpoint under their Hugging Face names."""

    def __init__(self, folder: str | Path, table: LayoutTable) -> None:
        """Match the checkpoint with the layout table.

        Args:
            table: layout at tensor parallel size 1.

        Raises:
            ConversionError: a file is missing or truncated, a parameter is missing, misshapen or incomplete, or the
                checkpoint has a tensor that the layout table lacks.
        """
        self.folder = Path(folder)
        found = find_distributed_checkpoint(self.folder)
        if found is None:
            raise ConversionError(
                f"{folder} is not a Megatron checkpoint: it has neither {METADATA} nor {TRACKER}. "
                "Give the folder that contains them."
            )
        self.checkpoint = found
        metadata = read_metadata(found)
        self.tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not NO_WEIGHTS.match(key)
        }
        self._check_files(metadata)
        shapes = hf_shapes(table)
        # a tied output layer is read from the embedding
        mapped = {name: layout for name, layout in table.items() if not _repeats_embedding(name, table)}
        self._stored = {name: self._find(name, layout.shape(1), layout.slices(0, 1)) for name, layout in mapped.items()}
        self._check_all_mapped()
        self._shapes = shapes
        self._pieces: dict[str, list[tuple[str, Slice]]] = {name: [] for name in shapes}
        for name, layout in mapped.items():
            for piece in layout.slices(0, 1):
                self._pieces[piece.hf_name].append((name, piece))
        self._chunks = self._index_chunks(metadata)
        self._files = _Files()

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor in the checkpoint."""
        return self._stored[self._pieces[name][0][0]].dtype

    def read(self, name: str, index: Index) -> Tensor:
        """Read a slice of one tensor, in the checkpoint's dtype."""
        hf_box = _box_of(index, self._shapes[name])
        target = torch.empty(box_shape(hf_box), dtype=self.dtype(name))
        for parameter, piece in self._pieces[name]:
            common = intersection(hf_box, piece.hf_box)
            if common is not None:
                box = moved_box(common, piece.hf_box, piece.shard_box)
                self._read_parameter(self._stored[parameter], box, target[box_index(relative_box(common, hf_box))])
        return target

    def _read_parameter(self, stored: _StoredParameter, box: Box, target: Tensor) -> None:
        """Fill ``target`` with a box of a parameter."""
        for key in stored.keys:
            first = 0 if key.half is None else key.half * stored.rows // 2
            rows = stored.rows if key.half is None else stored.rows // 2
            common = intersection(box, ((first, first + rows), *box[1:]))
            if common is None:
                continue
            inside = ((common[0][0] - first, common[0][1] - first), *common[1:])
            part = target[box_index(relative_box(common, box))]
            for chunk in self._chunks[key.key][key.prefix]:
                self._read_chunk(chunk, key.prefix, inside, part, stored.dtype)

    def _read_chunk(self, chunk: Chunk, prefix: tuple[int, ...], box: Box, target: Tensor, dtype: torch.dtype) -> None:
        """Fill those elements of ``target`` that a chunk stores, by reading whole rows of the chunk."""
        common = intersection(box, chunk.box[len(prefix) :])
        if common is None:
            return
        shape = box_shape(chunk.box)
        row_shape = shape[len(prefix) + 1 :]
        rows_before = 0  # index of the first row to read, counted over all leading dimensions of the chunk
        for position, (start, _), extent in zip(prefix, chunk.box, shape, strict=False):
            rows_before = rows_before * extent + position - start
        top = chunk.box[len(prefix)][0]
        rows_before = rows_before * shape[len(prefix)] + common[0][0] - top
        part = target[box_index(relative_box(common, box))]
        shape_of_rows = (common[0][1] - common[0][0], *row_shape)
        whole_rows = tuple(part.shape) == shape_of_rows and part.is_contiguous()
        rows = part if whole_rows else torch.empty(shape_of_rows, dtype=dtype)
        file = self._files.open(chunk.path)
        start = self._start(chunk, file, shape, dtype)
        read_into(rows, file, start + rows_before * num_bytes(row_shape, dtype), chunk.path)
        if not whole_rows:
            columns = relative_box(common, chunk.box[len(prefix) :])[1:]
            part.copy_(rows[(slice(None), *box_index(columns))])

    def _start(self, chunk: Chunk, file: int, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Offset in the file of the first byte of a chunk's tensor."""
        key = (chunk.path, chunk.offset)
        if key not in self._files.starts:
            size = num_bytes(shape, dtype)
            self._files.starts[key] = locate(chunk.path, file, chunk.offset, chunk.length, shape, size)
        return self._files.starts[key]

    def _find(self, name: str, shape: tuple[int, ...], slices: Iterable[Slice]) -> _StoredParameter:
        """Find the form in which the checkpoint stores a parameter, and check its shape."""
        forms = list(stored_forms(name))
        form = next((form for form in forms if all(stored.key in self.tensors for stored in form)), None)
        if form is None:
            tied = " If its embeddings are tied, config.json must say tie_word_embeddings=true."
            raise ConversionError(
                f"{self.checkpoint}: parameter {name} is missing (tried {forms[0][0].key} and its alternatives). "
                "The checkpoint is incomplete or has another architecture than config.json."
                + (tied if name == VOCABULARY[1] else "")
            )
        entries = [self.tensors[stored.key] for stored in form]
        shapes = [tuple(entry.size)[len(stored.prefix) :] for stored, entry in zip(form, entries, strict=True)]
        rows = sum(part[0] for part in shapes)
        matches = (rows, *shapes[0][1:]) == shape
        if name in VOCABULARY:  # its padding depends on the parallel layout of the run that saved it
            matches = rows >= max(piece.shard_box[0][1] for piece in slices) and shapes[0][1:] == shape[1:]
        is_outside = any(
            position >= size
            for stored, entry in zip(form, entries, strict=True)
            for position, size in zip(stored.prefix, entry.size, strict=False)
        )
        if not matches or is_outside:
            raise ConversionError(
                f"{self.checkpoint}: {form[0].key} has shape {tuple(entries[0].size)}, but config.json gives {name} "
                f"shape {shape}. config.json and the checkpoint do not match."
            )
        return _StoredParameter(form, rows, entries[0].properties.dtype)

    def _check_files(self, metadata: Metadata) -> None:
        """Check that the files store every element of every tensor."""
        sizes: dict[str, int | None] = {}
        for key, entry in self.tensors.items():
            covered = 0
            for chunk in entry.chunks:
                info = metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
                if info is None:
                    raise ConversionError(f"{self.checkpoint}: {METADATA} does not name the file of a part of {key}.")
                if getattr(info, "transform_descriptors", None):
                    raise ConversionError(f"{self.checkpoint}: {key} is stored compressed, which is not supported.")
                path = self.checkpoint / info.relative_path
                if info.relative_path not in sizes:
                    sizes[info.relative_path] = path.stat().st_size if path.exists() else None
                size = sizes[info.relative_path]
                if size is None or size < info.offset + info.length:
                    fault = "is missing" if size is None else f"has {size} bytes, expected {info.offset + info.length}"
                    raise ConversionError(
                        f"{path} {fault}; it stores a part of {key}. "
                        "Copy the files of every rank that saved the checkpoint."
                    )
                covered += prod(chunk.sizes)
            if covered < prod(entry.size):
                raise ConversionError(
                    f"{self.checkpoint}: only {covered} of {prod(entry.size)} elements of {key} are stored. "
                    "The part of a rank is missing."
                )

    def _check_all_mapped(self) -> None:
        """Check that the layout table uses every tensor of the checkpoint, and every layer and expert in it."""
        used: dict[str, set[tuple[int, ...]]] = {}
        for parameter in self._stored.values():
            for stored in parameter.keys:
                used.setdefault(stored.key, set()).add(stored.prefix)
        unmapped = sorted(set(self.tensors) - set(used))
        if unmapped:
            tied = "; with tie_word_embeddings=true there is none" if unmapped[0] == VOCABULARY[1] else ""
            raise ConversionError(
                f"{self.checkpoint}: {len(unmapped)} tensors are not part of the architecture of config.json, first "
                f"{unmapped[0]}{tied}. config.json and the checkpoint do not match."
            )
        for key, prefixes in used.items():
            depth = len(next(iter(prefixes)))
            expected = prod(self.tensors[key].size[:depth])
            if len(prefixes) != expected:
                raise ConversionError(
                    f"{self.checkpoint}: {key} has {expected} layers or experts, config.json says {len(prefixes)}. "
                    "config.json and the checkpoint do not match."
                )

    def _index_chunks(self, metadata: Metadata) -> dict[str, dict[tuple[int, ...], list[Chunk]]]:
        """Map key -> indices of layer and expert -> chunks that store a part of them."""
        depths = {stored.key: len(stored.prefix) for found in self._stored.values() for stored in found.keys}
        index: dict[str, dict[tuple[int, ...], list[Chunk]]] = {}
        for key, depth in depths.items():
            chunks_of = index[key] = {}
            for entry in self.tensors[key].chunks:
                info = metadata.storage_data[MetadataIndex(key, entry.offsets)]
                box = tuple((start, start + size) for start, size in zip(entry.offsets, entry.sizes, strict=True))
                chunk = Chunk(box, self.checkpoint / info.relative_path, info.offset, info.length)
                for prefix in itertools.product(*(range(*extent) for extent in box[:depth])):
                    chunks_of.setdefault(prefix, []).append(chunk)
        return index


def _repeats_embedding(name: str, table: LayoutTable) -> bool:
    """Whether a parameter is an output layer that is tied to the embedding."""
    embedding, output = VOCABULARY
    return name == output and table[output].slices(0, 1)[0].hf_name == table[embedding].slices(0, 1)[0].hf_name


def _box_of(index: Index, shape: tuple[int, ...]) -> Box:
    """Box of an index that may leave out trailing dimensions."""
    leading = [part.indices(size)[:2] for part, size in zip(index, shape, strict=False)]
    return (*leading, *((0, size) for size in shape[len(leading) :]))
