"""Hugging Face checkpoint folders: read slices of safetensors, write folders atomically."""

import json
import os
import shutil
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.errors import ConversionError
from megatron_rl.weights.file_bytes import num_bytes, read_into
from megatron_rl.weights.layout import Index
from megatron_rl.weights.reader import WeightReader

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
# other files of a model folder that describe its weights rather than the model
DESCRIPTIONS = (".index.json", "conversion.json", "latest_checkpointed_iteration.txt")


# names of types in safetensors headers
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class _Entry:
    """Type, shape and position of one tensor; ``offset`` is in bytes from the start of the file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class HFReader:
    """Reads slices of the tensors of a Hugging Face folder, only the bytes of each slice."""

    def __init__(self, folder: str | Path) -> None:
        """Open the safetensors files of a folder.

        Raises:
            ConversionError: the folder or a file is missing, truncated or damaged, or files contradict each other.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ConversionError(f"model folder {self.folder} does not exist. Give a Hugging Face checkpoint folder.")
        self._files = {name: _open(self.folder / name) for name in self._file_names()}
        self._descriptors = {name: os.open(self.folder / name, os.O_RDONLY) for name in self._files}
        self._entries: dict[str, _Entry] = {}
        for file in self._files:
            for name, entry in _header(self.folder / file, self._descriptors[file]).items():
                if name in self._entries:
                    raise ConversionError(
                        f"{self.folder}: tensor {name} is in {self._entries[name].file} and in {file}. "
                        "Fetch the checkpoint again."
                    )
                self._entries[name] = _Entry(file, *entry)
        self._check_index()

    def __del__(self) -> None:
        for descriptor in vars(self).get("_descriptors", {}).values():
            os.close(descriptor)

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the file's header."""
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor in the file."""
        return self._find(name).dtype

    def read(self, name: str, index: Index) -> Tensor:
        """Read a slice of one tensor, in the file's dtype."""
        entry = self._find(name)
        extents = [range(*part.indices(size)) for part, size in zip(index, entry.shape, strict=False)]
        if any(len(extent) < size for extent, size in zip(extents[1:], entry.shape[1:], strict=False)):
            return self._files[entry.file].get_slice(name)[index]
        row = entry.shape[1:]
        first, count = (extents[0].start, len(extents[0])) if extents else (0, entry.shape[0] if entry.shape else 1)
        tensor = torch.empty((count, *row) if entry.shape else (), dtype=entry.dtype)
        offset = entry.offset + first * num_bytes(row, entry.dtype)
        read_into(tensor, self._descriptors[entry.file], offset, self.folder / entry.file)
        return tensor

    def _find(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ConversionError(
                f"{self.folder}: tensor {name} is missing. The checkpoint is incomplete or has another architecture."
            )
        return self._entries[name]

    def _file_names(self) -> list[str]:
        index = self.folder / INDEX_NAME
        if index.exists():
            try:
                return sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (json.JSONDecodeError, KeyError, AttributeError) as error:
                raise ConversionError(f"{index} is damaged: {error!r}. Fetch it again.") from error
        if (self.folder / SINGLE_NAME).exists():
            return [SINGLE_NAME]
        raise ConversionError(
            f"{self.folder} has neither {SINGLE_NAME} nor {INDEX_NAME}. Only safetensors checkpoints are supported."
        )

    def _check_index(self) -> None:
        index = self.folder / INDEX_NAME
        if not index.exists():
            return
        listed = json.loads(index.read_text())["weight_map"]
        for name, file in listed.items():
            if name not in self._entries or self._entries[name].file != file:
                raise ConversionError(
                    f"{index} says that {name} is in {file}, but it is not. Fetch the checkpoint again."
                )
        unlisted = sorted(set(self._entries) - set(listed))
        if unlisted:
            raise ConversionError(
                f"{index} does not name {unlisted[0]}, which is in {self._entries[unlisted[0]].file}. "
                "Fetch the checkpoint again."
            )


def _open(path: Path):  # type: ignore[no-untyped-def]
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise ConversionError(f"{path} is missing although the index names it. Fetch the checkpoint again.") from error
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} is truncated or not safetensors ({error}). Fetch it again.") from error


def _header(path: Path, file: int) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    """Dtype, shape and byte offset of every tensor of a file that safetensors has opened and thereby validated."""
    (length,) = struct.unpack("<Q", os.pread(file, 8, 0))
    found = {}
    for name, entry in json.loads(os.pread(file, length, 8)).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ConversionError(
                f"{path}: tensor {name} has type {entry['dtype']}, expected one of {', '.join(DTYPES)}."
            )
        found[name] = (DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
    return found


def write_hf_folder(
    target: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    like: str | Path,
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write a complete Hugging Face folder, which appears under its name only when complete.

    Args:
        target: folder to create; must not exist.
        tensors: (name, tensor) pairs; they are streamed, and at most one file's are in memory.
        like: folder whose config, tokenizer and template files are copied.
        config: contents of config.json that replace the copied ones.
        max_shard_bytes: maximum bytes of tensors in one safetensors file.

    Raises:
        ConversionError: the target exists or cannot be written.
    """
    target = Path(target)
    if target.exists():
        raise ConversionError(f"{target} exists already. Choose another folder or remove it.")
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_shards(partial, tensors, max_shard_bytes)
        copy_model_files(Path(like), partial)
        if config is not None:
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ConversionError(f"cannot write {target}: {error}. Free space or choose another folder.") from error


def copy_model_files(source: Path, target: Path) -> None:
    """Copy all files of a model folder but its weights: config, generation config, tokenizer, chat template."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith((*WEIGHT_SUFFIXES, *DESCRIPTIONS)):
            shutil.copy2(file, target / file.name)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    files: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(pending, folder / f"shard-{len(files)}", metadata={"format": "pt"})
        files.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if pending and size + num_bytes > max_shard_bytes:
            flush()
            size = 0
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += num_bytes
        total += num_bytes
    if pending:
        flush()
    if len(files) == 1:
        os.replace(folder / "shard-0", folder / SINGLE_NAME)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        os.replace(folder / f"shard-{number}", folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2))


def check_against_table(reader: WeightReader, shapes: Mapping[str, tuple[int, ...]], ignored: Iterable[str]) -> None:
    """Check that a checkpoint has every tensor of the layout table with its shape, and no others.

    Args:
        reader: reader of the checkpoint.
        shapes: name -> shape that the layout table expects.
        ignored: names of tensors that may exist but contain no weights.

    Raises:
        ConversionError: a tensor is missing, misshapen or unmapped; the message names the first.
    """
    names = reader.names()
    missing = sorted(set(shapes) - names)
    if missing:
        raise ConversionError(
            f"{reader.folder}: {len(missing)} tensors are missing, first {missing[0]}. The checkpoint is incomplete"
            + (", or config.json must say tie_word_embeddings=true." if missing == ["lm_head.weight"] else ".")
        )
    unmapped = sorted(names - set(shapes) - set(ignored))
    if unmapped:
        raise ConversionError(
            f"{reader.folder}: {len(unmapped)} tensors are not part of this architecture, first {unmapped[0]}. "
            "config.json and the weights do not match."
        )
    for name, shape in shapes.items():
        if reader.shape(name) != shape:
            raise ConversionError(
                f"{reader.folder}: {name} has shape {reader.shape(name)}, but config.json says {shape}. "
                "config.json and the weights do not match."
            )


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype for "fp32" or "bf16" in a configuration."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
