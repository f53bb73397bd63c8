"""Token sampling from logits, and seeds that depend only on the sample."""

import hashlib

import torch
from torch import Tensor

from megatron_rl.types import SamplingParams


def sample_seed(run_seed: int, *indices: int) -> int:
    """Return a 63-bit seed for indices such as (step, prompt, sample); different indices give unrelated seeds."""
    text = ",".join(str(number) for number in (run_seed, *indices))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def uniforms(seed: int, count: int) -> Tensor:
    """Return [count] float64 in [0, 1), the random draws of one sample."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def choose(logits: Tensor, draws: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Sample a token for every row, with its log-probability under the distribution it was drawn from.

    Args:
        logits: [B, V] float32.
        draws: [B] float64 in [0, 1); unused at temperature 0.
        params: temperature, top_p and top_k.

    Returns:
        Tokens [B] int64 and log-probabilities [B] float32. Greedy sampling (temperature 0) reports the
        log-probability at temperature 1.
    """
    if params.temperature == 0:
        tokens = logits.argmax(-1)
        logprobs = logits.log_softmax(-1)
    else:
        logprobs = _restrict(logits / params.temperature, params).log_softmax(-1)
        cumulative = logprobs.exp().double().cumsum(-1)
        # draws are scaled by the sum, because rounding leaves it slightly off 1
        tokens = torch.searchsorted(cumulative, (draws * cumulative[:, -1])[:, None], right=True)[:, 0]
        tokens = tokens.clamp(max=logits.size(-1) - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _restrict(logits: Tensor, params: SamplingParams) -> Tensor:
    """Set the logits outside top-k and top-p to -inf."""
    if 0 < params.top_k < logits.size(-1):
        threshold = logits.topk(params.top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if params.top_p < 1:
        values, order = logits.sort(-1, descending=True)
        probabilities = values.softmax(-1)
        # a token stays if the more likely tokens sum to less than top_p; the most likely one always stays
        outside = probabilities.cumsum(-1) - probabilities >= params.top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), float("-inf"))
    return logits
