"""Exact comparison of text."""

from megatron_rl.rewards.types import RewardInput


def exact_match(sample: RewardInput, after: str | None = None) -> float:
    """1 when the finished response is the answer, else 0; white space at the ends does not count.

    Args:
        after: compare only what follows the last occurrence of this text, when it occurs.
    """
    if sample.finish_reason != "stop" or sample.answer is None:
        return 0.0
    response = sample.response.rsplit(after, 1)[-1] if after else sample.response
    return float(response.strip() == sample.answer.strip())
