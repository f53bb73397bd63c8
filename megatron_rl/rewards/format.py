"""Reward for the format of a response."""

import re

from megatron_rl.rewards.types import RewardInput

THINK_ANSWER = r"^<think>.*?</think>\s*<answer>.*?</answer>\s*$"


def think_answer_format(sample: RewardInput, pattern: str = THINK_ANSWER) -> float:
    """Return 1 if the whole response has the format <think>…</think> <answer>…</answer>, else 0.

    Args:
        pattern: regular expression of the format, matched from the start; "." also matches line breaks.
    """
    return float(re.match(pattern, sample.response, re.DOTALL) is not None)
