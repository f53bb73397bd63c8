"""Guess a number that is the prompt's answer; the environment says whether it is higher or lower."""

import re

from megatron_rl.environments.base import Episode, Turn
from megatron_rl.errors import DataError
from megatron_rl.types import Prompt


class GuessNumber:
    """Worth 1 when guessed, less by ``cost`` for every wrong guess before."""

    def __init__(self, *, cost: float = 0.1) -> None:
        self._cost = cost

    def begin(self, prompt: Prompt, seed: int) -> Episode:
        """
        Raises:
            DataError: the prompt's answer is not a whole number.
        """
        if prompt.answer is None or not re.fullmatch(r"-?\d+", prompt.answer.strip()):
            raise DataError(f"prompt {prompt.prompt_id}: the answer {prompt.answer!r} is not a whole number to guess.")
        return _Guessing(int(prompt.answer), self._cost)


class _Guessing:
    def __init__(self, number: int, cost: float) -> None:
        self._number = number
        self._cost = cost

    def step(self, response: str) -> Turn:
        found = re.search(r"-?\d+", response)
        if found is None:
            return Turn("say a number", -self._cost)
        guess = int(found[0])
        if guess == self._number:
            return Turn(None, 1.0)
        return Turn("higher" if guess < self._number else "lower", -self._cost)
