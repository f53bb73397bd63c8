"""Choosing among the responses to a prompt: at random, by majority, by score.

Source: majority vote from self-consistency, arXiv 2203.11171; best of n by a verifier from arXiv 2110.14168; votes
weighted by it from Math-Shepherd, arXiv 2312.08935 eq. 6.
"""

import re
from collections.abc import Hashable, Sequence

from megatron_rl.rewards.math import last_boxed


def last_match(response: str, pattern: str) -> str | None:
    """What the first group of a regular expression last found in a response; None: nothing."""
    found = None
    for match in re.finditer(pattern, response, re.MULTILINE):
        found = match.group(1).strip()
    return found


def shown_answer(response: str, pattern: str | None) -> str | None:
    """The answer that a response gives: by ``last_match``, or without a pattern what is in the last \\boxed{}."""
    if pattern is not None:
        return last_match(response, pattern)
    boxed = last_boxed(response)
    return None if boxed is None else boxed.strip()


def majority(answers: Sequence[Hashable | None], weights: Sequence[float] | None = None) -> int | None:
    """Place of the first of the responses whose answer is given most often; None when none has one.

    Of answers that are given as often as each other the one wins that came first.

    Args:
        weights: of each response, such as the probability that it is right; not below 0; None: all count alike.
    """
    sums: dict[Hashable, float] = {}
    for answer, weight in zip(answers, weights or [1.0] * len(answers), strict=True):
        if answer is not None:
            sums[answer] = sums.get(answer, 0.0) + weight
    return answers.index(max(sums, key=sums.__getitem__)) if sums else None


def best(scores: Sequence[float]) -> int:
    """Place of the highest score, the first of equal ones."""
    return max(range(len(scores)), key=scores.__getitem__)
