"""Countdown: reach a target with + - * / and every given number exactly once. Every problem has a solution.

Source: the task of TinyZero (Jiayi-Pan/Countdown-Tasks-3to4), with the same column names.
"""

import random
from fractions import Fraction

from megatron_rl.data.generated.base import Row, check_split, select_split
from megatron_rl.errors import DataError

PROMPT = (
    "Using the numbers {numbers}, create an equation that equals {target}. You can use basic arithmetic operations "
    "(+, -, *, /) and each number must be used exactly once. Show your work in <think> </think> tags and return the "
    "final expression in <answer> </answer> tags, for example <answer> (1 + 2) * 3 </answer>."
)


class Countdown:
    """Problems with a few small numbers and a positive whole target."""

    def __init__(
        self,
        min_numbers: int = 3,
        max_numbers: int = 4,
        largest: int = 99,
        largest_target: int = 999,
        num_train: int = 10000,
        num_test: int = 512,
        prompt: str = PROMPT,
        seed: int = 0,
    ) -> None:
        """
        Args:
            prompt: template with the placeholders {numbers} and {target}.
            seed: seed of the problems.
        """
        if not 2 <= min_numbers <= max_numbers:
            raise DataError(
                f"countdown min_numbers={min_numbers}, max_numbers={max_numbers}: expected 2 <= min <= max."
            )
        self._counts = (min_numbers, max_numbers)
        self._largest, self._largest_target = largest, largest_target
        self._sizes = {"train": num_train, "test": num_test}
        self._prompt, self._seed = prompt, seed

    def rows(self, split: str) -> list[Row]:
        check_split("countdown", split)
        rng = random.Random(f"countdown {self._seed}")
        num_problems = sum(self._sizes.values())
        problems: dict[tuple[tuple[int, ...], int], str] = {}
        for _ in range(100 * num_problems):
            if len(problems) == num_problems:
                break
            numbers = [rng.randint(1, self._largest) for _ in range(rng.randint(*self._counts))]
            solved = random_expression(numbers, rng)
            if solved is not None and 0 < solved[1] <= self._largest_target:
                problems.setdefault((tuple(sorted(numbers)), int(solved[1])), solved[0])
        if len(problems) < num_problems:
            raise DataError(
                f"countdown found {len(problems)} of {num_problems} different problems. "
                "Lower num_train or num_test, or raise largest."
            )
        rows = [self._row(numbers, target, solution) for (numbers, target), solution in problems.items()]
        return select_split(rows, split, self._sizes["test"])

    def _row(self, numbers: tuple[int, ...], target: int, solution: str) -> Row:
        return {
            "prompt": self._prompt.format(numbers=list(numbers), target=target),
            "answer": str(target),
            "demonstration": f"<think></think>\n<answer>{solution}</answer>",
            "nums": list(numbers),
            "target": target,
        }


def random_expression(numbers: list[int], rng: random.Random) -> tuple[str, Fraction] | None:
    """Return a random expression that uses every number once, and its value; None unless that is a whole number."""
    parts = [(str(n), Fraction(n)) for n in numbers]
    while len(parts) > 1:
        (left, a), (right, b) = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        operator = rng.choice("+-*/")
        if operator == "/" and b == 0:
            return None
        value = {"+": a + b, "-": a - b, "*": a * b}[operator] if operator != "/" else a / b
        parts.append((f"({left} {operator} {right})", value))
    text, value = parts[0]
    return (text[1:-1], value) if value.denominator == 1 else None
