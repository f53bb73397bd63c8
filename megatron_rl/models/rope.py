"""Rotary frequencies of a model."""

import math

import torch
from torch import Tensor

from megatron_rl.models.spec import ModelSpec


def inverse_frequencies(spec: ModelSpec) -> Tensor:
    """[head_dim / 2] float32 angles per position, Llama 3 scaling applied.

    Source: RoFormer, arXiv 2104.09864; the scaling as published with Llama 3.1.
    """
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    frequencies = 1.0 / spec.rope_theta**exponents
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    # 1 where the wavelength is short (kept), 0 where it is long (divided by the factor), linear between
    kept = (scaling.original_max_position_embeddings / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    kept = kept.clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor
