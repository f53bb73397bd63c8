"""Choosing one of several responses to a prompt, by majority vote or by score.

Source: majority vote: self-consistency, arXiv 2203.11171; best of n by a verifier: arXiv 2110.14168; votes weighted by
the verifier: Math-Shepherd, arXiv 2312.08935 eq. 6.
"""

import re
from collections.abc import Hashable, Sequence

from megatron_rl.rewards.math import last_boxed


def last_match(response: str, pattern: str) -> str | None:
    """Return the first group of the last match of a regular expression in a response; None without a match."""
    found = None
    for match in re.finditer(pattern, response, re.MULTILINE):
        found = match.group(1).strip()
    return found


def shown_answer(response: str, pattern: str | None) -> str | None:
    """Extract a response's answer: ``last_match`` of the pattern, or without one the content of the last \\boxed{}."""
    if pattern is not None:
        return last_match(response, pattern)
    boxed = last_boxed(response)
    return None if boxed is None else boxed.strip()


def majority(answers: Sequence[Hashable | None], weights: Sequence[float] | None = None) -> int | None:
    """Return the index of the first response with the most frequent answer; None if no response has an answer.

    Among equally frequent answers, the one that occurs first wins.

    Args:
        answers: answer of each response; None if it has none.
        weights: weight of each response, 0 or more, such as the probability that it is right; None: equal weights.
    """
    sums: dict[Hashable, float] = {}
    for answer, weight in zip(answers, weights or [1.0] * len(answers), strict=True):
        if answer is not None:
            sums[answer] = sums.get(answer, 0.0) + weight
    return answers.index(max(sums, key=sums.__getitem__)) if sums else None


def best(scores: Sequence[float]) -> int:
    """Return the index of the highest score; the first one among equals."""
    return max(range(len(scores)), key=scores.__getitem__)
