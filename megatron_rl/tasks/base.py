"""What a generated task offers."""

from collections.abc import Mapping
from typing import Any, Protocol

Row = Mapping[str, Any]


class Task(Protocol):
    """Makes rows with the columns prompt, answer, demonstration and whatever the reward reads."""

    def __init__(self, **options: Any) -> None: ...

    def rows(self, split: str) -> list[Row]:
        """All rows of "train" or "test", the same on every call; the splits share no problem.

        Raises:
            DataError: unknown split.
        """
        ...
