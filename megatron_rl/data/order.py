"""The order in which a run uses its data."""

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Order(Generic[T]):
    """Endless passes over items, a new order in each; any place can be jumped to."""

    def __init__(self, items: Sequence[T], *, shuffle: bool, seed: int) -> None:
        self._items = items
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def take(self, start: int, count: int) -> list[T]:
        """The items at places start, start + 1, … counted from the beginning of the run."""
        return [self._at(place) for place in range(start, start + count)]

    def _at(self, place: int) -> T:
        epoch, offset = divmod(place, len(self._items))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        return self._items[self._order[offset]]

    def _order_of(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._items)))
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return torch.randperm(len(self._items), generator=generator).tolist()
