"""Low-rank adapters in files: PEFT's folders, and those that a run begins with."""

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
"""Before the names in PEFT's files."""


class FreshAdapters:
    """Adapters that add nothing yet: b is 0, a is drawn as PEFT draws it, the same under every layout."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
        self._shapes = shapes
        self._seed = seed

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of one matrix, float32."""
        shape = self._shapes[name]
        if name.endswith("lora_B.weight"):
            return torch.zeros(shape)[index]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        bound = shape[1] ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)[index]


class PeftReader:
    """Slices of the adapters of a PEFT folder."""

    def __init__(self, folder: str | Path, shapes: dict[str, tuple[int, ...]], *, rank: int, alpha: float) -> None:
        """
        Args:
            shapes: of all matrices that are expected.

        Raises:
            ConversionError: a file cannot be read, or holds adapters of other matrices, rank or scale.
        """
        self.folder = Path(folder)
        config = self._config()
        for key, wanted in (("r", rank), ("lora_alpha", alpha)):
            if config.get(key) != wanted:
                name = {"r": "lora.rank", "lora_alpha": "lora.alpha"}[key]
                raise ConversionError(
                    f"{self.folder / CONFIG}: {key} is {config.get(key)}, but {name}={wanted}. Set {name} to it."
                )
        for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
            if config.get(key):
                raise ConversionError(
                    f"{self.folder / CONFIG}: {key}={config[key]!r} is not supported. Give a folder of plain LoRA."
                )
        try:
            self._file: Any = safe_open(self.folder / WEIGHTS, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ConversionError(f"{self.folder / WEIGHTS} cannot be read: {error}. Fetch it again.") from error
        names = list(self._file.keys())
        found = {name.removeprefix(PREFIX): tuple(self._file.get_slice(name).get_shape()) for name in names}
        if found != shapes:
            apart = sorted(set(found.items()) ^ set(shapes.items()))
            raise ConversionError(
                f"{self.folder / WEIGHTS} does not hold the adapters of lora.targets: {len(found)} matrices, expected "
                f"{len(shapes)}; first that is not the same: {apart[0][0]} {list(apart[0][1])}. "
                f"Set lora.targets to those of {CONFIG}, and model.path to their model."
            )

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of one matrix as it is stored."""
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
    """Write adapters as PEFT's ``from_pretrained`` reads them; they appear under the name only when whole.

    Args:
        tensors: (name, matrix), all of them.
        base: the model that they belong to.

    Raises:
        ConversionError: it cannot be written.
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
        found = {PREFIX + name: tensor.contiguous().cpu() for name, tensor in tensors}
        save_file(found, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2))
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"cannot write {target}: {error}. Free space or choose another folder.") from error
