"""Two-digit addition with two kinds of demonstrations: hasty estimates and worked solutions.

A demonstration is either a hasty estimate from rounded numbers ("130" for 37+85, right about one
time in ten) or worked columns with the answer behind ">" ("12,12>122"), units first. A model
trained on the mixture mostly answers hastily; RL finds that the worked way is rewarded.
"""

import random
from typing import Any

from megatron_rl.data.generated.base import Row
from megatron_rl.errors import DataError

SPLIT_SEED = 1234
NUM_TEST = 512


class HastyAddition:
    """Problems "a+b=" with 10 <= a, b <= 99."""

    def __init__(self, hasty_fraction: float = 0.6, num_rows: int | None = None, seed: int = 0) -> None:
        """
        Args:
            hasty_fraction: share of demonstrations that are hasty estimates.
            num_rows: number of training rows, drawn with replacement; None: each problem once.
            seed: seed of the draw and of the demonstrations; the split does not depend on it.
        """
        self._hasty_fraction = hasty_fraction
        self._num_rows = num_rows
        self._seed = seed

    def rows(self, split: str) -> list[Row]:
        pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
        random.Random(SPLIT_SEED).shuffle(pairs)
        rng = random.Random(self._seed)
        if split == "test":
            chosen = pairs[:NUM_TEST]
        elif split == "train":
            train = pairs[NUM_TEST:]
            chosen = train if self._num_rows is None else rng.choices(train, k=self._num_rows)
        else:
            raise DataError(f"hasty_addition has no split {split!r}: expected 'train' or 'test'.")
        return [self._row(a, b, rng) for a, b in chosen]

    def _row(self, a: int, b: int, rng: random.Random) -> dict[str, Any]:
        hasty = rng.random() < self._hasty_fraction
        return {
            "prompt": f"{a}+{b}=",
            "answer": str(a + b),
            "demonstration": estimate(a, b) if hasty else worked_columns(a, b),
        }


def estimate(a: int, b: int) -> str:
    """Return the sum of both numbers, each rounded to tens."""
    return str((a + 5) // 10 * 10 + (b + 5) // 10 * 10)


def worked_columns(a: int, b: int) -> str:
    """Return the column sums, units first and with the carry, followed by the answer."""
    units = a % 10 + b % 10
    tens = a // 10 + b // 10 + units // 10
    return f"{units:02d},{tens:02d}>{a + b}"
