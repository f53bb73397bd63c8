"""Checksums of tensors that can be summed up over boxes: the ranks that hold parts give that of the whole.

Each element's bits, times a number of its row and a number of its column, modulo 2^64. A changed, moved or missing
element shows; equal sums from different values are as likely as with any 64-bit checksum that nobody attacks.
"""

import torch
from torch import Tensor

from megatron_rl.weights.layout import Box

# elements that are widened to 64 bits at a time
CHUNK = 2**22
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def box_checksum(part: Tensor, box: Box) -> int:
    """Checksum of a box of a tensor.

    Args:
        part: the elements of the box.
        box: where they stand in the whole tensor, of 1 or 2 dimensions.
    """
    rows = part.reshape(part.size(0), -1)
    columns = _factors(box[1] if len(box) > 1 else (0, 1), 0x9E3779B97F4A7C15, part.device)
    of_rows = _factors(box[0], 0xC2B2AE3D27D4EB4F, part.device)
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    step = max(1, CHUNK // max(1, rows.size(1)))
    for first in range(0, rows.size(0), step):
        bits = rows[first : first + step].contiguous().view(_BITS[part.element_size()]).to(torch.int64)
        # 0 must count as well, or a tensor of zeros would be like none
        total += (((bits + 0x1234567) * columns).sum(1) * of_rows[first : first + step]).sum()
    return int(total)


def _factors(extent: tuple[int, int], multiplier: int, device: torch.device) -> Tensor:
    """An odd number for every row or column, int64 with wrap-around."""
    signed = multiplier - 2**64 if multiplier >= 2**63 else multiplier
    places = torch.arange(*extent, dtype=torch.int64, device=device)
    mixed = (places + 1) * signed
    return (mixed ^ (mixed >> 29)) | 1
