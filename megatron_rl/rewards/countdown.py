"""The countdown reward of TinyZero, with a safe evaluator."""

import re

from megatron_rl.errors import RewardError
from megatron_rl.rewards.arithmetic import evaluate
from megatron_rl.rewards.types import RewardInput

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def countdown(sample: RewardInput, format_score: float = 0.1, tagged: bool = True) -> float:
    """1 for an expression with every number once that reaches the target, format_score for any other
    answer, 0 for none.

    Args:
        format_score: value of an answer that is wrong.
        tagged: the answer stands in the last <answer> tags; otherwise the whole response is the answer.

    The prompt's row has the columns ``nums`` and ``target``. Unlike TinyZero's, powers, floor division
    and decimals are refused, as they let a model cheat.
    """
    try:
        numbers, target = sample.metadata["nums"], sample.metadata["target"]
    except KeyError as error:
        raise RewardError(f"countdown needs the column {error} of the prompt's row") from error
    if tagged:
        found = _ANSWER.findall(sample.response)
        if not found:
            return 0.0
        answer = found[-1]
    else:
        answer = sample.response
    try:
        value, used = evaluate(answer)
    except ValueError:
        return format_score
    return 1.0 if sorted(used) == sorted(numbers) and value == target else format_score
