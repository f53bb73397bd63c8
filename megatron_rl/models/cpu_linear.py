"""Matrix products in float32 on the CPU with oneDNN.

torch uses MKL for them, which on AMD processors leaves AVX-512 unused: a Zen 5 core reaches 90 instead of 210
GFLOP/s. oneDNN comes with torch, detects what the processor supports and also rounds in float32.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# A call of oneDNN costs about 10 microseconds more, which products of fewer multiplications do not save.
MIN_MULTIPLICATIONS = 2**20


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``F.linear`` of [..., K] and [N, K], computed by oneDNN if that is faster and no gradient is needed."""
    if not _is_faster(x, weight, x.numel() * weight.size(0)):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` of [..., K] and [K, N], which may be transposed views; oneDNN is used as in ``linear``."""
    if not _is_faster(a, b, a.numel() * b.size(1)):
        return a @ b
    if a.dim() == 2 and not a.is_contiguous() and a.size(0) > b.size(1):
        # oneDNN needs its first operand in row-major order: transpose the smaller one
        return torch.ops.mkldnn._linear_pointwise(b.t(), a, None, "none", [], "").t()
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


def _is_faster(a: Tensor, b: Tensor, multiplications: int) -> bool:
    if (
        multiplications < MIN_MULTIPLICATIONS
        or a.device.type != "cpu"
        or a.dtype != torch.float32
        or b.dtype != a.dtype
    ):
        return False
    differentiated = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    return not differentiated and _has_onednn()


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
