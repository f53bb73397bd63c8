"""Additive tensor checksums: the checksums of disjoint boxes sum to the checksum of the whole tensor.

The checksum is the sum, modulo 2^64, of each element's bits times a factor of its row and a factor of its column. It
detects changed, moved and missing elements; collisions are as rare as with any non-cryptographic 64-bit checksum.
"""

import torch
from torch import Tensor

from megatron_rl.weights.layout import Box

# number of elements that are widened to 64 bits at a time
CHUNK = 2**22
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def box_checksum(part: Tensor, box: Box) -> int:
    """Return the checksum of a box of a tensor, a signed 64-bit integer.

    Args:
        part: the elements of the box.
        box: position of the elements in the whole tensor, which has 1 or 2 dimensions.
    """
    rows = part.reshape(part.size(0), -1)
    column_factors = _factors(box[1] if len(box) > 1 else (0, 1), 0x9E3779B97F4A7C15, part.device)
    row_factors = _factors(box[0], 0xC2B2AE3D27D4EB4F, part.device)
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    step = max(1, CHUNK // max(1, rows.size(1)))
    for first in range(0, rows.size(0), step):
        bits = rows[first : first + step].contiguous().view(_BITS[part.element_size()]).to(torch.int64)
        # the offset makes zeros count: otherwise a missing tensor would equal a tensor of zeros
        total += (((bits + 0x1234567) * column_factors).sum(1) * row_factors[first : first + step]).sum()
    return int(total)


def _factors(extent: tuple[int, int], multiplier: int, device: torch.device) -> Tensor:
    """Odd factor of every row or column, [stop - start] int64 with wrap-around."""
    signed = multiplier - 2**64 if multiplier >= 2**63 else multiplier
    indices = torch.arange(*extent, dtype=torch.int64, device=device)
    mixed = (indices + 1) * signed
    return (mixed ^ (mixed >> 29)) | 1
