"""What many answers to many questions come to. Pure functions of verdicts.

Sources: pass@k without bias from HumanEval, arXiv 2107.03374 eq. 1; errors of means over clustered questions from
arXiv 2411.00640.
"""

import math
import random
from collections.abc import Sequence


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that one of k samples is right, drawn without replacement from so many of which so many are.

    Args:
        k: at most num_samples.
    """
    if num_samples - num_right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / n for n in range(num_samples - num_right + 1, num_samples + 1))


def mean(values: Sequence[float]) -> float:
    """NaN without values."""
    return sum(values) / len(values) if values else math.nan


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of one value for each question; samples of one question are not independent and count as one.

    NaN with fewer than two questions.
    """
    if len(values) < 2:
        return math.nan
    middle = mean(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean, by drawing questions again with replacement."""
    if not values:
        return math.nan, math.nan
    draw = random.Random(seed)
    means = sorted(mean(draw.choices(values, k=len(values))) for _ in range(draws))
    cut = (1 - level) / 2
    return means[int(cut * draws)], means[min(draws - 1, int((1 - cut) * draws))]


def paired_difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Mean of what changed at the same questions, and its standard error."""
    changes = [new - old for old, new in zip(before, after, strict=True)]
    return mean(changes), standard_error(changes)


def repetition(text: str, n: int = 20) -> float:
    """Share of a text's n-grams of characters that were there before; 0 for a short one."""
    grams = [text[place : place + n] for place in range(len(text) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
