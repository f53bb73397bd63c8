"""Statistics over graded answers: pass@k, means with errors, repetition. Pure functions.

Sources: unbiased pass@k: HumanEval, arXiv 2107.03374 eq. 1; standard errors of means over clustered questions:
arXiv 2411.00640.
"""

import math
import random
from collections.abc import Sequence


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the probability that at least one of k samples, drawn without replacement, is right.

    Args:
        num_samples: samples from which to draw.
        num_right: right ones among them.
        k: samples to draw, at most num_samples.
    """
    if num_samples - num_right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / n for n in range(num_samples - num_right + 1, num_samples + 1))


def mean(values: Sequence[float]) -> float:
    """Return the mean; NaN without values."""
    return sum(values) / len(values) if values else math.nan


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean over questions; NaN with fewer than two questions.

    Args:
        values: one value for each question, because samples of one question are not independent.
    """
    if len(values) < 2:
        return math.nan
    middle = mean(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the bootstrap percentile interval of the mean over questions; NaN without values.

    Args:
        values: one value for each question.
        level: of confidence.
        draws: number of resamples.
        seed: of the resampling.
    """
    if not values:
        return math.nan, math.nan
    draw = random.Random(seed)
    means = sorted(mean(draw.choices(values, k=len(values))) for _ in range(draws))
    cut = (1 - level) / 2
    return means[int(cut * draws)], means[min(draws - 1, int((1 - cut) * draws))]


def paired_difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference at the same questions, and its standard error."""
    changes = [new - old for old, new in zip(before, after, strict=True)]
    return mean(changes), standard_error(changes)


def repetition(text: str, n: int = 20) -> float:
    """Return the share of a text's character n-grams that occur earlier in it; 0 for a text shorter than n."""
    grams = [text[start : start + n] for start in range(len(text) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
