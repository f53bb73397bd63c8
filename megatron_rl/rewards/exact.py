"""Exact comparison of text."""

from megatron_rl.rewards.types import RewardInput


def exact_match(sample: RewardInput, after: str | None = None) -> float:
    """Return 1 if the response is finished and equals the answer, else 0; leading and trailing white space is ignored.

    Args:
        after: compare only what follows the last occurrence of this text, if it occurs.
    """
    if sample.finish_reason != "stop" or sample.answer is None:
        return 0.0
    response = sample.response.rsplit(after, 1)[-1] if after else sample.response
    return float(response.strip() == sample.answer.strip())
