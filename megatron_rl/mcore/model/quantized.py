"""Frozen matrices in eight or four bits, dense only while they are multiplied.

Sources: NF4 and its blocks of 64 from QLoRA, arXiv 2305.14314 section 3 and appendix E, without its double
quantisation; int8 by the largest value from LLM.int8(), arXiv 2208.07339 section 2.1, of a block in place of a row.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Format = Literal["int8", "nf4"]
BLOCK = 64
"""Neighbouring columns that share a scale; blocks never cross rows, so that they are the same for every layout."""

# the quantiles of a normal distribution that QLoRA's appendix E lists
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class QuantizedWeight(torch.Tensor):
    """A frozen [rows, columns] matrix that acts as the dense one it stands for.

    Every operation sees the dense matrix and lets go of it. Megatron's product with a frozen matrix keeps this one for
    the backward pass; torch's own would keep the dense one.
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
            dtype: of the matrix that it stands for.
        """
        shape = (scales.size(0), scales.size(1) * BLOCK)
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)
        made._codes, made._scales, made._format = codes, scales, kind
        return made

    def dequantized(self) -> Tensor:
        """The dense matrix."""
        if self._format == "int8":
            values = self._codes.float() / 127
        else:
            codes = torch.stack([self._codes >> 4, self._codes & 15], dim=-1).flatten(1)
            values = _levels(codes.device)[codes.int()]
        return (values.unflatten(1, (-1, BLOCK)) * self._scales[..., None]).flatten(1).to(self.dtype)

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        """What really takes memory."""
        return self._codes, self._scales

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if function is torch.ops.aten.detach.default:
            (self,) = args
            return QuantizedWeight(self._codes, self._scales, self._format, self.dtype)
        if function._schema.is_mutable and isinstance(args[0], QuantizedWeight):
            raise TypeError(f"{function} would write into a quantised matrix, which is not possible.")
        dense, named = tree_map(_dense, (args, kwargs or {}))
        return function(*dense, **named)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedWeight({self._format}, {tuple(self.shape)}, {self.dtype})"


def quantized(weight: Tensor, kind: Format) -> QuantizedWeight:
    """The nearest codes of a dense matrix.

    Args:
        weight: [rows, columns], of which the columns divide by BLOCK.
    """
    blocks = weight.detach().float().unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(-1)
    shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    if kind == "int8":
        codes = (shares * 127).round().to(torch.int8).flatten(1)
    else:
        levels = _levels(weight.device)
        # the boundaries lie half way between neighbours
        found = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).flatten(1)
        codes = found[:, ::2] << 4 | found[:, 1::2]
    return QuantizedWeight(codes, scales, kind, weight.dtype)


def held_tensors(parameter: Tensor) -> Sequence[Tensor]:
    """What takes memory of a parameter."""
    data = parameter.data
    return data.held if isinstance(data, QuantizedWeight) else (data,)


@functools.cache
def _levels(device: torch.device) -> Tensor:
    """Of NF4, on a device; made once, as a copy would wait for it."""
    return torch.tensor(NF4, device=device)


def _dense(value: Any) -> Any:
    return value.dequantized() if isinstance(value, QuantizedWeight) else value
