"""Penalty for the length of a response."""

from megatron_rl.errors import RewardError
from megatron_rl.rewards.types import RewardInput


def soft_overlong(sample: RewardInput, max_tokens: int, buffer_tokens: int) -> float:
    """Return 0 up to max_tokens - buffer_tokens, a linear decrease to -1 at max_tokens, and -1 beyond.

    Args:
        max_tokens: length from which the penalty is -1.
        buffer_tokens: length of the interval before max_tokens in which the penalty grows.

    Raises:
        RewardError: the buffer is not from 1 to max_tokens.

    Source: soft overlong punishment, DAPO, arXiv 2503.14476 eq. 13 (20480 and 4096 there).
    """
    if not 1 <= buffer_tokens <= max_tokens:
        raise RewardError(f"soft_overlong: buffer_tokens={buffer_tokens} is not from 1 to max_tokens={max_tokens}")
    beyond = sample.num_tokens - (max_tokens - buffer_tokens)
    return -min(1.0, max(0.0, beyond / buffer_tokens))
