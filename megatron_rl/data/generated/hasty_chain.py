"""Chains of additions and subtractions, solved step by step with occasional hasty steps.

The problem "7+5-3=" is solved by "7+5=12" and "12-3=9", one per line. A hasty step rounds its result to tens, "7+5=10",
and the following steps continue from that value. No correct value is a multiple of ten, so a hasty step is always
wrong, and so are all steps after it. A step is right if the number that it ends with is right, which is the case if and
only if correct calculation from there on gives the right answer. Hasty errors are systematic, so the most frequent
answer is often wrong.
"""

import random
from collections.abc import Sequence

from megatron_rl.data.generated.base import Row, check_split
from megatron_rl.errors import DataError

LARGEST_OPERAND = 9
LARGEST_VALUE = 99
NUM_TEST = 512

Problem = tuple[int, ...]
"""The first number, followed by the (signed) numbers that are added to it."""


class HastyChain:
    """Problems of a few one-digit numbers whose value stays between 0 and 99."""

    def __init__(
        self, num_operands: int = 5, hasty_fraction: float = 0.3, num_rows: int = 10000, seed: int = 0
    ) -> None:
        """
        Args:
            num_operands: numbers in a problem; a solution has one step fewer.
            hasty_fraction: share of hasty steps in demonstrations, completions and rejected solutions.
            num_rows: number of training rows, drawn with replacement.
            seed: seed of the draw and of the solutions; the held-out problems do not depend on it.
        """
        if num_operands < 3 or not 0 <= hasty_fraction <= 1:
            raise DataError(
                f"hasty_chain num_operands={num_operands}, hasty_fraction={hasty_fraction}: "
                "expected 3 or more, and 0 to 1."
            )
        self._num_operands, self._hasty_fraction = num_operands, hasty_fraction
        self._num_rows, self._seed = num_rows, seed

    def rows(self, split: str) -> list[Row]:
        check_split("hasty_chain", split)
        rng = random.Random("hasty_chain held out")
        held_out = dict.fromkeys(self._problem(rng) for _ in range(NUM_TEST))
        if split == "test":
            return [self._row(problem, rng) for problem in held_out]
        rng = random.Random(f"hasty_chain {self._seed}")
        problems: list[Problem] = []
        while len(problems) < self._num_rows:
            problem = self._problem(rng)
            if problem not in held_out:
                problems.append(problem)
        return [self._row(problem, rng) for problem in problems]

    def _problem(self, rng: random.Random) -> Problem:
        problem = [rng.randint(1, LARGEST_OPERAND)]
        while len(problem) < self._num_operands:
            operand = rng.choice((-1, 1)) * rng.randint(1, LARGEST_OPERAND)
            value = sum(problem) + operand
            if 0 < value <= LARGEST_VALUE and value % 10:
                problem.append(operand)
        return tuple(problem)

    def _row(self, problem: Problem, rng: random.Random) -> Row:
        steps, labels = solve(problem, self._hasty_fraction, rng)
        wrong, rejected = labels, steps
        while all(wrong):
            rejected, wrong = solve(problem, max(self._hasty_fraction, 0.1), rng)
        return {
            "prompt": f"{problem[0]}{''.join(f'{operand:+d}' for operand in problem[1:])}=",
            "answer": str(sum(problem)),
            "demonstration": "\n".join(steps),
            "completions": steps,
            "labels": labels,
            "completion": "\n".join(steps),
            "label": labels[-1],
            "chosen": "\n".join(solve(problem, 0.0, rng)[0]),
            "rejected": "\n".join(rejected),
        }


def solve(problem: Problem, hasty_fraction: float, rng: random.Random) -> tuple[list[str], list[bool]]:
    """Return the steps of a solution and whether each is right; a step is hasty with probability ``hasty_fraction``."""
    value = expected = problem[0]
    steps, labels = [], []
    for operand in problem[1:]:
        result, expected = value + operand, expected + operand
        if rng.random() < hasty_fraction:
            result = max(0, (result + 5) // 10 * 10)
        steps.append(f"{value}{operand:+d}={result}")
        labels.append(result == expected)
        value = result
    return steps, labels


def right_steps(prompt: str, steps: Sequence[str]) -> list[bool]:
    """Return which steps of a solution are right, by calculating the number that each should end with."""
    numbers = [int(text) for text in prompt.rstrip("=").replace("-", "+-").split("+")]
    values = [sum(numbers[: index + 2]) for index in range(len(steps))]
    return [step.rpartition("=")[2] == str(value) for step, value in zip(steps, values, strict=True)]
