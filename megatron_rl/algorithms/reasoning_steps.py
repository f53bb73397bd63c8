"""Steps of a solution: where they end, what they are worth, and what they make of the whole."""

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
    """The score of a solution from those of its steps, at least one."""
    return AGGREGATIONS[how](scores)


def step_spans(text: str, separator: str) -> list[tuple[int, int]]:
    """Begin and end of each step of a text, the separator behind it included.

    Blank stretches between separators are no steps of their own: they belong to the step before. Where all is blank
    there is no step.
    """
    spans: list[tuple[int, int]] = []
    start = place = 0
    while place < len(text):
        found = text.find(separator, place)
        last, end = (len(text), len(text)) if found < 0 else (found, found + len(separator))
        if text[place:last].strip():
            spans.append((start, end))
            start = end
        elif spans:
            spans[-1] = (spans[-1][0], end)
            start = end
        place = end
    return spans


def step_ends(texts: Sequence[str], separator: str) -> list[int]:
    """Tokens that end a step: of each step the one in which its text ends, and the last one of all.

    Args:
        texts: of each token of the response, special ones empty.

    Returns:
        places in ``texts``, ascending; empty without tokens.
    """
    if not texts:
        return []
    ends_of_tokens = list(accumulate(map(len, texts)))
    spans = step_spans("".join(texts), separator)
    ends = [bisect_right(ends_of_tokens, end - 1) for _, end in spans[:-1]]
    return list(dict.fromkeys([*ends, len(texts) - 1]))


def step_label(graded: Sequence[bool], *, soft: bool) -> float:
    """What a step is worth by whether continuations after it end right.

    Args:
        graded: of each continuation, at least one.
        soft: the share that is right; otherwise 1 when one of them is.

    Source: Math-Shepherd, arXiv 2312.08935 eq. 3 (hard) and 4 (soft).
    """
    return sum(graded) / len(graded) if soft else float(any(graded))
