"""Reasoning steps of a response: where they end, their labels, and the aggregation of their scores."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal

Aggregation = Literal["min", "prod", "last", "mean"]

# Source: Math-Shepherd, arXiv 2312.08935 section 3.3 (min); the others from Let's Verify Step by Step,
# arXiv 2305.20050 section 2.6 and appendix F (prod, min), and from TRL's and OpenRLHF's practice (last, mean).
AGGREGATIONS: dict[Aggregation, Callable[[Sequence[float]], float]] = {
    "min": min,
    "prod": math.prod,
    "last": lambda scores: scores[-1],
    "mean": lambda scores: sum(scores) / len(scores),
}


def aggregated(scores: Sequence[float], how: Aggregation) -> float:
    """Aggregate the scores of the steps of a response, at least one, to the score of the response."""
    return AGGREGATIONS[how](scores)


def step_spans(text: str, separator: str) -> list[tuple[int, int]]:
    """Start and end index of each step of a text, including the separator after the step.

    Blank text between separators belongs to the previous step. A blank text has no steps.
    """
    spans: list[tuple[int, int]] = []
    start = position = 0
    while position < len(text):
        found = text.find(separator, position)
        content_end, end = (len(text), len(text)) if found < 0 else (found, found + len(separator))
        if text[position:content_end].strip():
            spans.append((start, end))
            start = end
        elif spans:
            spans[-1] = (spans[-1][0], end)
            start = end
        position = end
    return spans


def step_ends(texts: Sequence[str], separator: str) -> list[int]:
    """Indices of the tokens that end a step: the token in which each step's text ends, and the last token of all.

    Args:
        texts: text of each token of the response; empty for special tokens.
        separator: text between steps.

    Returns:
        Indices in ``texts``, ascending; empty if there are no tokens.
    """
    if not texts:
        return []
    token_ends = list(accumulate(map(len, texts)))
    spans = step_spans("".join(texts), separator)
    ends = [bisect_right(token_ends, end - 1) for _, end in spans[:-1]]
    return list(dict.fromkeys([*ends, len(texts) - 1]))


def step_label(graded: Sequence[bool], *, soft: bool) -> float:
    """Label of a step, from the outcomes of continuations that start after it.

    Args:
        graded: whether each continuation is correct, at least one.
        soft: True: the fraction of correct continuations; False: 1 if any is correct, else 0.

    Source: Math-Shepherd, arXiv 2312.08935 eq. 3 (hard) and 4 (soft).
    """
    return sum(graded) / len(graded) if soft else float(any(graded))
