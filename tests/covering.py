"""Covering arrays: few combinations of options in which every pair of values occurs.

``make test`` runs the covering array of a matrix of tests; ``make test-all`` also runs the cases marked ``exhaustive``.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


def matrix(is_valid: Callable[[dict[str, Any]], bool] = lambda _: True, **options: Sequence[Any]) -> Any:
    """Parametrize a test by every valid combination of the options; those beyond a covering array are exhaustive."""
    few = [tuple(row.values()) for row in covering(options, is_valid)]
    product = itertools.product(*options.values())
    every = [row for row in product if is_valid(dict(zip(options, row, strict=True)))]
    return pytest.mark.parametrize(tuple(options), chosen(every, few))


def chosen(every: Iterable[T], few: Collection[T]) -> list[Any]:
    """Return the cases of a test, of which those that are not among ``few`` are exhaustive."""
    cases = []
    for case in every:
        values = case if isinstance(case, tuple) else (case,)
        name = "-".join(re.sub(r"\b[a-z_]+\.", "", str(value)) or "none" for value in values)
        cases.append(pytest.param(*values, id=name, marks=() if case in few else pytest.mark.exhaustive))
    return cases


def covering(
    options: Mapping[str, Sequence[T]], is_valid: Callable[[dict[str, T]], bool] = lambda _: True, *, strength: int = 2
) -> list[dict[str, T]]:
    """Return valid combinations of options in which every ``strength`` values that a valid one has occur together.

    Greedy and deterministic: each combination is the first of those that add the most.

    Args:
        options: values of each option; the first value is the default.
        is_valid: whether a combination, a value by option, can be tested.
        strength: 2 for pairs, 3 for triples.
    """
    combinations = [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
    combinations = [combination for combination in combinations if is_valid(combination)]
    bits: dict[tuple[tuple[str, T], ...], int] = {}
    masks = []
    for combination in combinations:
        mask = 0
        for together in itertools.combinations(combination.items(), strength):
            mask |= 1 << bits.setdefault(together, len(bits))
        masks.append(mask)
    chosen, missing = [], (1 << len(bits)) - 1
    while missing:
        best = max(range(len(masks)), key=lambda index: (masks[index] & missing).bit_count())
        chosen.append(combinations[best])
        missing &= ~masks[best]
    return chosen
