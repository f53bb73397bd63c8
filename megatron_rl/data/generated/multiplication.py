"""Products of whole numbers of given sizes. Source: the multiplication task of TinyZero."""

import random

from megatron_rl.data.generated.base import Row, check_split, select_split
from megatron_rl.errors import DataError

PROMPT = (
    "What is {a} * {b}? Show your work in <think> </think> tags and return the product in <answer> </answer> tags, for "
    "example <answer> 42 </answer>."
)


class Multiplication:
    """Products of two factors with ``digits`` digits each."""

    def __init__(
        self,
        digits: int = 3,
        num_train: int = 10000,
        num_test: int = 512,
        prompt: str = PROMPT,
        seed: int = 0,
    ) -> None:
        """
        Args:
            digits: number of digits of each factor.
            prompt: template with the placeholders {a} and {b}.
            seed: seed of the problems.
        """
        possible = 81 if digits == 1 else (9 * 10 ** (digits - 1)) ** 2
        if digits < 1 or num_train + num_test > possible:
            raise DataError(
                f"multiplication digits={digits}: expected 1 or more, and no more than {possible} problems in "
                f"num_train={num_train} and num_test={num_test} together."
            )
        self._digits, self._prompt, self._seed = digits, prompt, seed
        self._sizes = {"train": num_train, "test": num_test}

    def rows(self, split: str) -> list[Row]:
        check_split("multiplication", split)
        rng = random.Random(f"multiplication {self._seed}")
        low, high = 10 ** (self._digits - 1), 10**self._digits - 1
        problems: dict[tuple[int, int], None] = {}
        while len(problems) < sum(self._sizes.values()):
            problems.setdefault((rng.randint(low, high), rng.randint(low, high)))
        rows: list[Row] = [
            {
                "prompt": self._prompt.format(a=a, b=b),
                "answer": str(a * b),
                "demonstration": f"<think></think>\n<answer>{a * b}</answer>",
            }
            for a, b in problems
        ]
        return select_split(rows, split, self._sizes["test"])
