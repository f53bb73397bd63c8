"""Hugging Face checkpoint folders: read slices of safetensors, write folders whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.errors import ConversionError
from megatron_rl.weights.layout import Index

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


class HFReader:
    """Slices of the tensors of a Hugging Face folder; a slice reads only its own bytes."""

    def __init__(self, folder: str | Path) -> None:
        """Open the files.

        Raises:
            ConversionError: the folder or a file is missing, truncated or damaged.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ConversionError(f"model folder {self.folder} does not exist. Give a Hugging Face checkpoint folder.")
        self._files = {}
        for name in self._file_names():
            self._files[name] = _open(self.folder / name)
        self._holder = {key: name for name, file in self._files.items() for key in file.keys()}  # noqa: SIM118
        self._check_index()

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._holder)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header alone."""
        return tuple(self._find(name).get_slice(name).get_shape())

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of one tensor in the file's dtype."""
        return self._find(name).get_slice(name)[index]

    def _find(self, name: str):  # type: ignore[no-untyped-def]
        if name not in self._holder:
            raise ConversionError(
                f"{self.folder}: tensor {name} is missing. The checkpoint is incomplete or of another architecture."
            )
        return self._files[self._holder[name]]

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
            f"{self.folder} has neither {SINGLE_NAME} nor {INDEX_NAME}. Only safetensors checkpoints are read."
        )

    def _check_index(self) -> None:
        index = self.folder / INDEX_NAME
        if not index.exists():
            return
        for name, file in json.loads(index.read_text())["weight_map"].items():
            if self._holder.get(name) != file:
                raise ConversionError(
                    f"{index} says that {name} is in {file}, but it is not. Fetch the checkpoint again."
                )


def _open(path: Path):  # type: ignore[no-untyped-def]
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise ConversionError(f"{path} is missing although the index names it. Fetch the checkpoint again.") from error
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} is truncated or not safetensors ({error}). Fetch it again.") from error


def write_hf_folder(
    target: str | Path, tensors: Iterable[tuple[str, Tensor]], *, like: str | Path, max_shard_bytes: int = 5 * 2**30
) -> None:
    """Write a complete Hugging Face folder, appearing under its name only when whole.

    Args:
        target: folder to create; must not exist.
        tensors: (name, tensor) pairs, streamed; at most one shard is held in memory.
        like: folder whose config, tokenizer and template files are copied.
        max_shard_bytes: size of one safetensors file.

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
        for file in Path(like).iterdir():
            if file.is_file() and not file.name.endswith((*WEIGHT_SUFFIXES, ".index.json")):
                shutil.copy2(file, partial / file.name)
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ConversionError(f"cannot write {target}: {error}. Free space or choose another folder.") from error


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


def check_against_table(reader: HFReader, shapes: Mapping[str, tuple[int, ...]], ignored: Iterable[str]) -> None:
    """Every tensor of the table is there with its shape, and no other tensor is.

    Args:
        reader: the folder.
        shapes: name -> shape that the layout table expects.
        ignored: names that may be there but carry nothing.

    Raises:
        ConversionError: naming the first missing, misshapen or unmapped tensor.
    """
    names = reader.names()
    missing = sorted(set(shapes) - names)
    if missing:
        raise ConversionError(
            f"{reader.folder}: {len(missing)} tensors are missing, first {missing[0]}. The checkpoint is incomplete."
        )
    unmapped = sorted(names - set(shapes) - set(ignored))
    if unmapped:
        raise ConversionError(
            f"{reader.folder}: {len(unmapped)} tensors have no place in this architecture, first {unmapped[0]}. "
            "config.json and the weights do not belong together."
        )
    for name, shape in shapes.items():
        if reader.shape(name) != shape:
            raise ConversionError(
                f"{reader.folder}: {name} has shape {reader.shape(name)}, but config.json says {shape}. "
                "config.json and the weights do not belong together."
            )


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a configuration's fp32 or bf16."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
