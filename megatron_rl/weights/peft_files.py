"""LoRA adapters: read and write PEFT folders, initialize new adapters."""

import json
import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.errors import ConversionError
from megatron_rl.weights.layout import Index

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
"""Prefix of the names in PEFT's files."""


class FreshAdapters:
    """New adapters: B is 0, A is initialized as PEFT does, with the same values under every parallel layout."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
        self._shapes = shapes
        self._seed = seed

    def read(self, name: str, index: Index) -> Tensor:
        """Return a slice of one matrix, float32."""
        shape = self._shapes[name]
        if name.endswith("lora_B.weight"):
            return torch.zeros(shape)[index]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        bound = shape[1] ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)[index]


class PeftReader:
    """Reads slices of the adapters of a PEFT folder."""

    def __init__(self, folder: str | Path, shapes: dict[str, tuple[int, ...]], *, rank: int, alpha: float) -> None:
        """
        Args:
            shapes: name -> shape of every expected matrix.
            rank: expected ``r`` (``lora.rank``).
            alpha: expected ``lora_alpha`` (``lora.alpha``).

        Raises:
            ConversionError: a file cannot be read, or has adapters of other matrices, another rank or another alpha.
        """
        self.folder = Path(folder)
        config = self._config()
        for key, expected in (("r", rank), ("lora_alpha", alpha)):
            if config.get(key) != expected:
                name = {"r": "lora.rank", "lora_alpha": "lora.alpha"}[key]
                raise ConversionError(
                    f"{self.folder / CONFIG}: {key} is {config.get(key)}, but {name}={expected}. "
                    f"Set {name}={config.get(key)}."
                )
        for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
            if config.get(key):
                raise ConversionError(
                    f"{self.folder / CONFIG}: {key}={config[key]!r} is not supported. Give plain LoRA adapters."
                )
        try:
            self._file: Any = safe_open(self.folder / WEIGHTS, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ConversionError(f"{self.folder / WEIGHTS} cannot be read: {error}. Fetch it again.") from error
        names = list(self._file.keys())
        found = {name.removeprefix(PREFIX): tuple(self._file.get_slice(name).get_shape()) for name in names}
        if found != shapes:
            different = sorted(set(found.items()) ^ set(shapes.items()))
            raise ConversionError(
                f"{self.folder / WEIGHTS} does not have the adapters of lora.targets: {len(found)} matrices, expected "
                f"{len(shapes)}; first difference: {different[0][0]} {list(different[0][1])}. "
                f"Set lora.targets to those of {CONFIG}, and model.path to the base model of the adapters."
            )

    def read(self, name: str, index: Index) -> Tensor:
        """Read a slice of one matrix, in the file's dtype."""
        tensor: Tensor = self._file.get_slice(PREFIX + name)[index]
        return tensor

    def _config(self) -> dict[str, Any]:
        path = self.folder / CONFIG
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConversionError(f"{path} cannot be read: {error}. Give a PEFT folder.") from error
        if config.get("peft_type") != "LORA":
            raise ConversionError(f"{path}: peft_type is {config.get('peft_type')!r}, expected 'LORA'.")
        return dict(config)


def write_peft_folder(
    target: Path, tensors: Iterable[tuple[str, Tensor]], *, base: str, rank: int, alpha: float, targets: Iterable[str]
) -> None:
    """Write a PEFT adapter folder for ``from_pretrained``; it appears under its name only when complete.

    Args:
        tensors: (name, matrix) of every adapter matrix, without the prefix of PEFT's names.
        base: name or path of the base model.
        rank, alpha: LoRA rank and alpha.
        targets: ``target_modules``.

    Raises:
        ConversionError: the folder cannot be written.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        prefixed = {PREFIX + name: tensor.contiguous().cpu() for name, tensor in tensors}
        save_file(prefixed, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2))
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"cannot write {target}: {error}. Free space or choose another folder.") from error
