"""What a generated task offers."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from megatron_rl.errors import DataError

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


def check_split(task: str, split: str) -> None:
    """
    Raises:
        DataError: it is neither "train" nor "test".
    """
    if split not in ("train", "test"):
        raise DataError(f"{task} has no split {split!r}: expected 'train' or 'test'.")


def part_of(rows: Sequence[Row], split: str, num_test: int) -> list[Row]:
    """The first rows are the test split, the others the training split."""
    return list(rows[:num_test] if split == "test" else rows[num_test:])
