"""Frozen matrices stored in eight or four bits and dequantised only while they are multiplied.

Sources: NF4 in blocks of 64 is from QLoRA, arXiv 2305.14314 section 3 and appendix E, without its double quantisation;
int8 scaled by the largest value is from LLM.int8(), arXiv 2208.07339 section 2.1, here per block instead of per row.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Format = Literal["int8", "nf4"]
BLOCK = 64
"""Number of neighbouring columns that share a scale. Blocks never cross rows, so they are the same for every layout."""

# quantiles of the normal distribution, as listed in appendix E of QLoRA
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class QuantizedWeight(torch.Tensor):
    """A frozen quantised [rows, columns] matrix that behaves like its dense equivalent.

    Every operation dequantises the matrix temporarily. For the backward pass, Megatron's product with a frozen matrix
    saves the quantised matrix; torch's own product would save the dense one.
    """

    _codes: Tensor
    _scales: Tensor
    _format: Format

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, kind: Format, dtype: torch.dtype) -> "QuantizedWeight":
        """
        Args:
            codes: [rows, columns] int8, or [rows, columns / 2] uint8 of two nf4 codes each.
            scales: [rows, columns / BLOCK] float32.
            kind: format of the codes.
            dtype: dtype of the dense matrix.
        """
        shape = (scales.size(0), scales.size(1) * BLOCK)
        weight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)
        weight._codes, weight._scales, weight._format = codes, scales, kind
        return weight

    def dequantized(self) -> Tensor:
        """Return the dense matrix."""
        if self._format == "int8":
            values = self._codes.float() / 127
        else:
            codes = torch.stack([self._codes >> 4, self._codes & 15], dim=-1).flatten(1)
            values = _levels(codes.device)[codes.int()]
        return (values.unflatten(1, (-1, BLOCK)) * self._scales[..., None]).flatten(1).to(self.dtype)

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        """The tensors that hold the memory: codes and scales."""
        return self._codes, self._scales

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if function is torch.ops.aten.detach.default:
            (self,) = args
            return QuantizedWeight(self._codes, self._scales, self._format, self.dtype)
        if function._schema.is_mutable and isinstance(args[0], QuantizedWeight):
            raise TypeError(f"{function} writes into a quantised matrix, which is read-only.")
        dense, named = tree_map(_dense, (args, kwargs or {}))
        return function(*dense, **named)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedWeight({self._format}, {tuple(self.shape)}, {self.dtype})"


def quantized(weight: Tensor, kind: Format) -> QuantizedWeight:
    """Quantise a dense matrix to the nearest codes.

    Args:
        weight: [rows, columns]; the number of columns must be a multiple of BLOCK.
        kind: format of the codes.
    """
    blocks = weight.detach().float().unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(-1)
    scaled = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    if kind == "int8":
        codes = (scaled * 127).round().to(torch.int8).flatten(1)
    else:
        levels = _levels(weight.device)
        # the boundaries are halfway between neighbouring levels
        indices = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).flatten(1)
        codes = indices[:, ::2] << 4 | indices[:, 1::2]
    return QuantizedWeight(codes, scales, kind, weight.dtype)


def held_tensors(parameter: Tensor) -> Sequence[Tensor]:
    """The tensors that hold the memory of a parameter."""
    data = parameter.data
    return data.held if isinstance(data, QuantizedWeight) else (data,)


@functools.cache
def _levels(device: torch.device) -> Tensor:
    """NF4 levels on a device; cached, because a copy from the host synchronises with the device."""
    return torch.tensor(NF4, device=device)


def _dense(value: Any) -> Any:
    return value.dequantized() if isinstance(value, QuantizedWeight) else value
