"""Rotary frequencies of a model, with its scaling for long contexts if it has one."""

import math

import torch
from torch import Tensor

from megatron_rl.models.spec import LinearRope, Llama3Rope, ModelSpec, YarnRope


def inverse_frequencies(spec: ModelSpec) -> Tensor:
    """Return the rotation angles per position, [head_dim / 2] float32.

    Source: RoFormer, arXiv 2104.09864, and the source of the scaling.
    """
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    frequencies = 1.0 / spec.rope_theta**exponents
    match spec.rope_scaling:
        case Llama3Rope() as scaling:
            kept = _kept_by_wavelength(frequencies, scaling)
        case YarnRope() as scaling:
            kept = _kept_by_rotations(spec, scaling)
        case LinearRope() as scaling:
            kept = torch.zeros_like(frequencies)
        case None:
            return frequencies
    # kept: 1 keeps a frequency, 0 divides it by the factor; values between interpolate
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def softmax_scale(spec: ModelSpec) -> float | None:
    """Return the factor on attention scores; None for the usual 1 / sqrt(head_dim).

    YaRN multiplies cosines and sines, hence both queries and keys, by ``attention_factor``, which multiplies the scores
    by its square.
    """
    if not isinstance(spec.rope_scaling, YarnRope):
        return None
    return spec.rope_scaling.attention_factor**2 / math.sqrt(spec.head_dim)


def _kept_by_wavelength(frequencies: Tensor, scaling: Llama3Rope) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    kept = (scaling.original_max_position_embeddings / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return kept.clamp(0, 1)


def _kept_by_rotations(spec: ModelSpec, scaling: YarnRope) -> Tensor:
    def dimension(rotations: float) -> float:
        """Return the (fractional) dimension that makes ``rotations`` turns within the original context."""
        ratio = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return spec.head_dim * math.log(ratio) / (2 * math.log(spec.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(spec.head_dim // 2, dtype=torch.float32) - low) / (high - low)
    return 1 - ramp.clamp(0, 1)
