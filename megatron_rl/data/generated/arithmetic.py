"""Whole numbers joined by + - and *, with parentheses, whose value is asked for."""

import random

from megatron_rl.data.generated.base import Row, check_split, part_of
from megatron_rl.errors import DataError

PROMPT = (
    "What is {expression}? Show your work in <think> </think> tags and return the value in <answer> </answer> tags, "
    "for example <answer> -42 </answer>."
)


class Arithmetic:
    """Expressions of as many numbers as asked for."""

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
            largest: of the numbers, which begin with 1.
            prompt: text with the place {expression}.
            seed: of the problems.
        """
        if not 2 <= min_numbers <= max_numbers:
            raise DataError(
                f"arithmetic min_numbers={min_numbers}, max_numbers={max_numbers}: expected 2 <= min <= max."
            )
        if largest**2 * 3 < 2 * (num_train + num_test):  # so that drawing different ones comes to an end
            raise DataError(
                f"arithmetic largest={largest}: too few expressions for num_train={num_train} and num_test={num_test}."
            )
        self._counts, self._largest = (min_numbers, max_numbers), largest
        self._sizes = {"train": num_train, "test": num_test}
        self._prompt, self._seed = prompt, seed

    def rows(self, split: str) -> list[Row]:
        check_split("arithmetic", split)
        draw = random.Random(f"arithmetic {self._seed}")
        problems: dict[str, int] = {}
        while len(problems) < sum(self._sizes.values()):
            problems.setdefault(*_expression(draw, draw.randint(*self._counts), self._largest))
        rows: list[Row] = [
            {
                "prompt": self._prompt.format(expression=expression),
                "answer": str(value),
                "demonstration": f"<think></think>\n<answer>{value}</answer>",
            }
            for expression, value in problems.items()
        ]
        return part_of(rows, split, self._sizes["test"])


def _expression(draw: random.Random, count: int, largest: int) -> tuple[str, int]:
    """So many numbers, split at a random place again and again, and their value."""
    if count == 1:
        number = draw.randint(1, largest)
        return str(number), number
    size = draw.randint(1, count - 1)
    (left, a), (right, b) = _expression(draw, size, largest), _expression(draw, count - size, largest)
    # a product needs no parentheses beside any sign
    left, right = (f"({part})" if "+" in part or "-" in part else part for part in (left, right))
    sign = draw.choice("+-*")
    return f"{left} {sign} {right}", {"+": a + b, "-": a - b, "*": a * b}[sign]
