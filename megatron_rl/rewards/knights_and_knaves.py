"""Whether everybody's role is named rightly."""

import re

from megatron_rl.errors import RewardError
from megatron_rl.rewards.types import RewardInput

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ROLE = re.compile(r"\b(\w+) is a (knight|knave)\b", re.IGNORECASE)


def knights_and_knaves(sample: RewardInput) -> float:
    """1 when the last <answer> says of everybody once, and of nobody else, what they are, and rightly; else 0.

    The prompt's row has the column ``roles``: name -> knight or knave.
    """
    roles = sample.metadata.get("roles")
    if not roles:
        raise RewardError("knights_and_knaves needs the column 'roles' of the prompt's row")
    answers = _ANSWER.findall(sample.response)
    if not answers:
        return 0.0
    said = [(name.lower(), role.lower()) for name, role in _ROLE.findall(answers[-1])]
    return float(sorted(said) == sorted((name.lower(), role) for name, role in roles.items()))
