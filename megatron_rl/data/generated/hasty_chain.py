"""Chains of additions and subtractions, solved step by step and now and then hastily.

The problem "7+5-3=" is solved by "7+5=12" and "12-3=9", a line each. A hasty step rounds its result to tens, "7+5=10",
and the next ones go on from there. No value on the right way is a multiple of ten, so a hasty step is always wrong, and
so is everything after it: a step is right when the number that it ends with is. Then, and only then, who calculates
correctly from there on arrives at the right answer. Haste is systematic: the answer given most often is often wrong.
"""

import random
from collections.abc import Sequence

from megatron_rl.data.generated.base import Row, check_split
from megatron_rl.errors import DataError

LARGEST_OPERAND = 9
LARGEST_VALUE = 99
NUM_TEST = 512

Problem = tuple[int, ...]
"""The first number, and what is added to it one by one."""


class HastyChain:
    """Problems of a few one-digit numbers whose value stays between 0 and 99."""

    def __init__(
        self, num_operands: int = 5, hasty_fraction: float = 0.3, num_rows: int = 10000, seed: int = 0
    ) -> None:
        """
        Args:
            num_operands: numbers in a problem; one step fewer.
            hasty_fraction: share of hasty steps in demonstrations, completions and rejected solutions.
            num_rows: training rows, drawn with replacement.
            seed: of the draw and of the solutions; the held-out problems are always the same.
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
        draw = random.Random("hasty_chain held out")
        held_out = dict.fromkeys(self._problem(draw) for _ in range(NUM_TEST))
        if split == "test":
            return [self._row(problem, draw) for problem in held_out]
        draw = random.Random(f"hasty_chain {self._seed}")
        problems: list[Problem] = []
        while len(problems) < self._num_rows:
            problem = self._problem(draw)
            if problem not in held_out:
                problems.append(problem)
        return [self._row(problem, draw) for problem in problems]

    def _problem(self, draw: random.Random) -> Problem:
        problem = [draw.randint(1, LARGEST_OPERAND)]
        while len(problem) < self._num_operands:
            operand = draw.choice((-1, 1)) * draw.randint(1, LARGEST_OPERAND)
            value = sum(problem) + operand
            if 0 < value <= LARGEST_VALUE and value % 10:
                problem.append(operand)
        return tuple(problem)

    def _row(self, problem: Problem, draw: random.Random) -> Row:
        steps, labels = solve(problem, self._hasty_fraction, draw)
        wrong, rejected = labels, steps
        while all(wrong):
            rejected, wrong = solve(problem, max(self._hasty_fraction, 0.1), draw)
        return {
            "prompt": f"{problem[0]}{''.join(f'{operand:+d}' for operand in problem[1:])}=",
            "answer": str(sum(problem)),
            "demonstration": "\n".join(steps),
            "completions": steps,
            "labels": labels,
            "completion": "\n".join(steps),
            "label": labels[-1],
            "chosen": "\n".join(solve(problem, 0.0, draw)[0]),
            "rejected": "\n".join(rejected),
        }


def solve(problem: Problem, hasty_fraction: float, draw: random.Random) -> tuple[list[str], list[bool]]:
    """Steps of a solution, of which so many are hasty, and which of them are right."""
    value = true = problem[0]
    steps, labels = [], []
    for operand in problem[1:]:
        found, true = value + operand, true + operand
        if draw.random() < hasty_fraction:
            found = max(0, (found + 5) // 10 * 10)
        steps.append(f"{value}{operand:+d}={found}")
        labels.append(found == true)
        value = found
    return steps, labels


def right_steps(prompt: str, steps: Sequence[str]) -> list[bool]:
    """Which steps of any solution are right, by calculating what they should end with."""
    numbers = [int(text) for text in prompt.rstrip("=").replace("-", "+-").split("+")]
    values = [sum(numbers[: place + 2]) for place in range(len(steps))]
    return [step.rpartition("=")[2] == str(value) for step, value in zip(steps, values, strict=True)]
