"""Arithmetic expressions of whole numbers with + - * and parentheses."""

import random

from megatron_rl.data.generated.base import Row, check_split, select_split
from megatron_rl.errors import DataError

PROMPT = (
    "What is {expression}? Show your work in <think> </think> tags and return the value in <answer> </answer> tags, "
    "for example <answer> -42 </answer>."
)


class Arithmetic:
    """Expressions of ``min_numbers`` to ``max_numbers`` numbers."""

    def __init__(
        self,
        min_numbers: int = 2,
        max_numbers: int = 4,
        largest: int = 99,
        num_train: int = 10000,
        num_test: int = 512,
        prompt: str = PROMPT,
        seed: int = 0,
    ) -> None:
        """
        Args:
            largest: largest number; the smallest is 1.
            prompt: template with the placeholder {expression}.
            seed: seed of the problems.
        """
        if not 2 <= min_numbers <= max_numbers:
            raise DataError(
                f"arithmetic min_numbers={min_numbers}, max_numbers={max_numbers}: expected 2 <= min <= max."
            )
        if largest**2 * 3 < 2 * (num_train + num_test):  # ensures that drawing distinct expressions terminates
            raise DataError(
                f"arithmetic largest={largest}: too few expressions for num_train={num_train} and num_test={num_test}."
            )
        self._counts, self._largest = (min_numbers, max_numbers), largest
        self._sizes = {"train": num_train, "test": num_test}
        self._prompt, self._seed = prompt, seed

    def rows(self, split: str) -> list[Row]:
        check_split("arithmetic", split)
        rng = random.Random(f"arithmetic {self._seed}")
        problems: dict[str, int] = {}
        while len(problems) < sum(self._sizes.values()):
            problems.setdefault(*_expression(rng, rng.randint(*self._counts), self._largest))
        rows: list[Row] = [
            {
                "prompt": self._prompt.format(expression=expression),
                "answer": str(value),
                "demonstration": f"<think></think>\n<answer>{value}</answer>",
            }
            for expression, value in problems.items()
        ]
        return select_split(rows, split, self._sizes["test"])


def _expression(rng: random.Random, count: int, largest: int) -> tuple[str, int]:
    """Return a random expression of ``count`` numbers, built by recursive splits, and its value."""
    if count == 1:
        number = rng.randint(1, largest)
        return str(number), number
    size = rng.randint(1, count - 1)
    (left, a), (right, b) = _expression(rng, size, largest), _expression(rng, count - size, largest)
    # a product needs no parentheses next to any operator
    left, right = (f"({part})" if "+" in part or "-" in part else part for part in (left, right))
    sign = rng.choice("+-*")
    return f"{left} {sign} {right}", {"+": a + b, "-": a - b, "*": a * b}[sign]
