"""Model weights under their Hugging Face names, whatever the files are."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_rl.weights.layout import Index


class WeightReader(Protocol):
    """Slices of tensors under their Hugging Face names."""

    folder: Path

    def names(self) -> set[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Type of one tensor as it is stored."""

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of one tensor as it is stored; reads little more than its own bytes."""
