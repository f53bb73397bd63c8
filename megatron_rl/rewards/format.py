"""The shape of a response."""

import re

from megatron_rl.rewards.types import RewardInput

THINK_ANSWER = r"^<think>.*?</think>\s*<answer>.*?</answer>\s*$"


def think_answer_format(sample: RewardInput, pattern: str = THINK_ANSWER) -> float:
    """1 when the whole response has the shape <think>…</think> <answer>…</answer>, else 0.

    Args:
        pattern: a regular expression, in which "." also matches line breaks.
    """
    return float(re.match(pattern, sample.response, re.DOTALL) is not None)
