"""Interface of generated tasks."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from megatron_rl.errors import DataError

Row = Mapping[str, Any]


class Task(Protocol):
    """Generates rows with the columns prompt, answer, demonstration and those that the reward reads."""

    def __init__(self, **options: Any) -> None: ...

    def rows(self, split: str) -> list[Row]:
        """Return all rows of a split, the same on every call; the splits share no problem.

        Args:
            split: "train" or "test".

        Raises:
            DataError: the split is unknown.
        """
        ...


def check_split(task: str, split: str) -> None:
    """Check the name of a split.

    Raises:
        DataError: it is neither "train" nor "test".
    """
    if split not in ("train", "test"):
        raise DataError(f"{task} has no split {split!r}: expected 'train' or 'test'.")


def select_split(rows: Sequence[Row], split: str, num_test: int) -> list[Row]:
    """Return the rows of a split: the first ``num_test`` rows for "test", the others for "train"."""
    return list(rows[:num_test] if split == "test" else rows[num_test:])
