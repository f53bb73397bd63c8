"""The countdown reward of TinyZero, with a safe evaluator."""

import re

from megatron_rl.errors import RewardError
from megatron_rl.rewards.arithmetic import evaluate
from megatron_rl.rewards.types import RewardInput

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def countdown(sample: RewardInput, format_score: float = 0.1, tagged: bool = True) -> float:
    """Return 1 for an expression that reaches the target with every number once, format_score for any other, else 0.

    The prompt's row must have the columns ``nums`` and ``target``. Unlike TinyZero's reward, powers, floor division and
    decimals are not accepted, as they let a model cheat.

    Args:
        format_score: reward of a wrong answer.
        tagged: whether the answer is in the last <answer> tags; otherwise the whole response is the answer.

    Raises:
        RewardError: a column is missing.
    """
    try:
        numbers, target = sample.metadata["nums"], sample.metadata["target"]
    except KeyError as error:
        raise RewardError(f"countdown needs the column {error} of the prompt's row") from error
    if tagged:
        answers = _ANSWER.findall(sample.response)
        if not answers:
            return 0.0
        answer = answers[-1]
    else:
        answer = sample.response
    try:
        value, used = evaluate(answer)
    except ValueError:
        return format_score
    return 1.0 if sorted(used) == sorted(numbers) and value == target else format_score
