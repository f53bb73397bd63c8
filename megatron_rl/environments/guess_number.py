"""An environment in which the policy guesses a number; after each guess it learns "higher" or "lower"."""

import re

from megatron_rl.environments.base import Episode, Turn
from megatron_rl.errors import DataError
from megatron_rl.types import Prompt


class GuessNumber:
    """The number is the prompt's answer; reward 1 for the right guess, minus ``cost`` for every wrong one before it."""

    def __init__(self, *, cost: float = 0.1) -> None:
        self._cost = cost

    def begin(self, prompt: Prompt, seed: int) -> Episode:
        """Start an episode about the number in ``prompt.answer``.

        Raises:
            DataError: the prompt's answer is not an integer.
        """
        if prompt.answer is None or not re.fullmatch(r"-?\d+", prompt.answer.strip()):
            raise DataError(
                f"prompt {prompt.prompt_id}: the answer is {prompt.answer!r}, expected an integer to guess."
            )
        return _Guessing(int(prompt.answer), self._cost)


class _Guessing:
    def __init__(self, number: int, cost: float) -> None:
        self._number = number
        self._cost = cost

    def step(self, response: str) -> Turn:
        match = re.search(r"-?\d+", response)
        if match is None:
            return Turn("say a number", -self._cost)
        guess = int(match[0])
        if guess == self._number:
            return Turn(None, 1.0)
        return Turn("higher" if guess < self._number else "lower", -self._cost)
