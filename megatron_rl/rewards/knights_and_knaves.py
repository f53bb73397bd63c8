"""Reward for puzzles of knights and knaves."""

import re

from megatron_rl.errors import RewardError
from megatron_rl.rewards.types import RewardInput

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ROLE = re.compile(r"\b(\w+) is a (knight|knave)\b", re.IGNORECASE)


def knights_and_knaves(sample: RewardInput) -> float:
    """Return 1 if the last <answer> names the right role of every person exactly once, and of nobody else; else 0.

    The prompt's row must have the column ``roles``: name -> knight or knave.

    Raises:
        RewardError: the column is missing.
    """
    roles = sample.metadata.get("roles")
    if not roles:
        raise RewardError("knights_and_knaves needs the column 'roles' of the prompt's row")
    answers = _ANSWER.findall(sample.response)
    if not answers:
        return 0.0
    answered = [(name.lower(), role.lower()) for name, role in _ROLE.findall(answers[-1])]
    return float(sorted(answered) == sorted((name.lower(), role) for name, role in roles.items()))
