"""Variable-length attention kernels for packed sequences on GPUs without Transformer Engine."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_rl.errors import ConfigError

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float | None, int | None], Tensor]
"""(query [T, heads, dim], key, value [T, groups, dim], cu_seqlens [S + 1], longest, scale, window) -> [T, heads, dim].

The window is the number of tokens that a token attends to, itself included; None: all tokens up to it."""


@cache
def variable_length_kernel(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """Return flash-attn's kernel if installed, else torch's; None on CPU or in fp32, which neither supports."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    return _flash_attention() or _torch_attention()


def _flash_attention() -> Kernel | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def attend(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float | None, window: int | None
    ) -> Tensor:
        window_size = (-1 if window is None else window - 1, 0)
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scale, causal=True, window_size=window_size
        )

    return attend


def _torch_attention() -> Kernel | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    accepted = inspect.signature(varlen_attn).parameters

    def attend(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float | None, window: int | None
    ) -> Tensor:
        # the first releases have an is_causal flag, and neither a window, a scale nor grouped queries
        options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
        if "is_causal" in accepted:
            if window is not None:
                raise ConfigError(
                    f"a sliding window of {window} tokens needs flash-attn or a newer torch. Install either."
                )
            options = {"is_causal": True}
        if "scale" in accepted:
            options["scale"] = scale
        elif scale is not None:
            q = q * (scale * q.size(-1) ** 0.5)
        if "enable_gqa" in accepted:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        output = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
        assert isinstance(output, Tensor)
        return output

    return attend
