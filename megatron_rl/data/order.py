"""The order in which a run uses its data."""

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Order(Generic[T]):
    """Endless epochs over items, reshuffled in each epoch, with random access to any position."""

    def __init__(self, items: Sequence[T], *, shuffle: bool, seed: int) -> None:
        self._items = items
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def take(self, start: int, count: int) -> list[T]:
        """Return ``count`` items from position ``start`` on, counted from the beginning of the run."""
        return [self._at(position) for position in range(start, start + count)]

    def _at(self, position: int) -> T:
        epoch, offset = divmod(position, len(self._items))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        return self._items[self._order[offset]]

    def _order_of(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._items)))
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return torch.randperm(len(self._items), generator=generator).tolist()
