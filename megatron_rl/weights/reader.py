"""The interface of all weight readers: model weights under their Hugging Face names, for any file format."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_rl.weights.layout import Index


class WeightReader(Protocol):
    """Reads slices of tensors under their Hugging Face names."""

    folder: Path

    def names(self) -> set[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor in the files."""

    def read(self, name: str, index: Index) -> Tensor:
        """Read a slice of one tensor, in its stored dtype; reads few more bytes than the slice has."""
